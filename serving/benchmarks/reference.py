"""What the benchmarks share: the CPU reference model, histories over its items, and how time is taken.

The reference model: 4 layers, 64 wide, chunks of 16, window of 8 chunks, 200,000 items, random weights (weights do not
change speed). It is written to `runs/reference` the first time, which takes the pipelines and a minute.
"""

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for name, value in (("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0"), ("OMP_NUM_THREADS", "1")):
    os.environ.setdefault(name, value)

REFERENCE = Path("runs/reference")
NUM_ITEMS = 200_000
T0 = 1_600_000_000


def reference_run() -> Path:
    """Return the reference run, written if it is not there."""
    if (REFERENCE / "run.json").exists():
        return REFERENCE
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from recsys_ksa.cli import call_verb

    draw = np.random.default_rng(0)
    users = np.repeat(np.arange(4000), NUM_ITEMS // 4000)
    items = draw.permutation(NUM_ITEMS) + 1
    columns = {
        "user_id": [f"t{user}" for user in users],
        "item_id": [f"i{item}" for item in items],
        "timestamp": T0 - 10**7 + np.arange(NUM_ITEMS) * 40,
    }
    shape = ["dim=64", "num_heads=2", "num_kv_heads=2", "head_dim=32", "feed_forward_dim=128"]
    shape += ["chunk_size=16", "window_chunks=8", 'layers=["summary","summary","summary","summary"]']
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table(columns), f"{folder}/log.parquet")
        call_verb("prepare", [f"{folder}/log.parquet", "--out", f"{folder}/ds", "--tie", "arrival"])
        changes = [part for setting in shape for part in ("--set", f"model.{setting}")]
        command = ["configs/smoke.toml", "--data", f"{folder}/ds", "--out", str(REFERENCE), "--steps", "0"]
        call_verb("train", [*command, *changes])
    cluster_items()
    return REFERENCE


def cluster_items() -> None:
    """Put the reference model's items around 2,000 centres, as trained ones lie: random ones have no nearness."""
    import torch
    from safetensors.torch import save_file

    from recsys_ksa.model.fingerprint import release_hash, state_fingerprint
    from recsys_ksa.run import load_network, open_run

    network = load_network(open_run(REFERENCE))
    weights = network.state_dict()
    (name,) = [name for name, value in weights.items() if value.dim() == 2 and len(value) == NUM_ITEMS + 1]
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(2000, weights[name].shape[1], generator=draw)
    near = 0.5 * torch.randn(weights[name].shape, generator=draw)
    weights[name].copy_(0.1 * (centres[torch.randint(2000, (NUM_ITEMS + 1,), generator=draw)] + near))
    save_file({key: value.contiguous() for key, value in weights.items()}, REFERENCE / "model.safetensors")
    info = json.loads((REFERENCE / "run.json").read_text())
    info |= {"release_hash": release_hash(network), "state_fingerprint": state_fingerprint(network)}
    (REFERENCE / "run.json").write_text(json.dumps(info))


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
