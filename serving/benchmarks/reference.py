"""What the benchmarks share: the CPU reference model, histories over its items, and how time is taken.

The reference model: 4 layers, 64 wide, chunks of 16, window of 8 chunks, 200,000 items, random weights (weights do not
change speed). It is written to `runs/reference` the first time.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

for name, value in (("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0"), ("OMP_NUM_THREADS", "1")):
    os.environ.setdefault(name, value)

REFERENCE = Path("runs/reference")
OTHER = Path("runs/reference-other")
NUM_ITEMS = 200_000
LARGE = Path("runs/large")
NUM_LARGE_ITEMS = 1_000_000
T0 = 1_600_000_000


REFERENCE_SHAPE = [
    *("dim=64", "num_heads=2", "num_kv_heads=2", "head_dim=32", "feed_forward_dim=128"),
    *("chunk_size=16", "window_chunks=8", 'layers=["summary","summary","summary","summary"]'),
]


def reference_run() -> Path:
    """Return the reference run, written if it is not there: random weights, and no data set behind it."""
    return written_run(REFERENCE, NUM_ITEMS, REFERENCE_SHAPE)


def other_run() -> Path:
    """Return a run beside the reference run, of the same shape and items, with other weights."""
    return written_run(OTHER, NUM_ITEMS, REFERENCE_SHAPE, seed=1)


def large_run() -> Path:
    """Return the run for one GPU, written if it is not there: 8 layers, 256 wide, a million items."""
    shape = ["dim=256", "num_heads=4", "num_kv_heads=4", "head_dim=64", "feed_forward_dim=512"]
    shape += ["chunk_size=16", "window_chunks=8", f"layers={8 * ['summary']}".replace("'", '"')]
    return written_run(LARGE, NUM_LARGE_ITEMS, shape)


def written_run(run: Path, num_items: int, shape: list[str], seed: int = 0) -> Path:
    """Return a run of clustered random items, written if it is not there."""
    from recsys_ksa.testing import random_run

    if not (run / "run.json").exists():
        changes = [f"seed={seed}", *(f"model.{one}" for one in shape)]
        random_run(run, num_items, changes, partial(cluster_items, seed=seed))
    return run


def with_lists(run: Path) -> Path:
    """Return a run with an approximate index, written if it is not there."""
    from recsys_ksa.cli import call_verb

    if not (run / "index" / "ivf.json").exists():
        call_verb("index", [str(run), "--kind", "ivf"])
    return run


def cluster_items(network: Any, seed: int = 0) -> None:
    """Put a network's items around 2,000 centres, as trained ones lie: random ones have no nearness."""
    import torch

    num_rows = network.features.num_items
    (table,) = [value for value in network.state_dict().values() if value.dim() == 2 and len(value) == num_rows]
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(2000, table.shape[1], generator=draw)
    near = 0.5 * torch.randn(table.shape, generator=draw)
    table.copy_(0.1 * (centres[torch.randint(2000, (len(table),), generator=draw)] + near))


def history(length: int, seed: int = 0) -> list[Any]:
    """Return a history over the reference model's items."""
    import numpy as np

    from ksa_serving.events import StoredEvent

    draw = np.random.default_rng(seed)
    items, times = draw.integers(1, NUM_ITEMS + 1, length), T0 + np.cumsum(draw.integers(1, 600, length))
    return [StoredEvent(n, f"i{i}", int(t), None, None, None) for n, (i, t) in enumerate(zip(items, times), start=1)]


@dataclass(frozen=True)
class Taken:
    """Medians in milliseconds: by the clock on the wall, and of this process on its one thread."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        """Return both."""
        return f"{self.wall:,.2f} ({self.cpu:,.2f})"


def milliseconds(work: Callable[[], object], times: int) -> Taken:
    """Return how long `work` takes. Beside other busy processes the processor's time is the one to compare."""
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(times):
        began, spent = time.perf_counter(), time.process_time()
        work()
        wall.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.process_time() - spent))
    return Taken(statistics.median(wall), statistics.median(cpu))


def load_model() -> Any:
    """Return the reference model."""
    from ksa_serving.release import load_release

    return load_release(reference_run()).model


def build(model: Any, events: list[Any], step: int = 8192) -> Any:
    """Return the state of events, appended in steps as the service does."""
    state = model.new_state()
    for start in range(0, len(events), step):
        state = model.append(state, events[start : start + step])
    return state


def heading(device: str = "cpu") -> str:
    """Return what a figure is worth nothing without: machine, load and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = f"{os.cpu_count()} cores, {platform.machine()}"
    if device != "cpu":
        import torch

        name = torch.cuda.get_device_name()
    return f"{name}, load {os.getloadavg()[0]:.1f}, commit {commit or 'unknown'}"
