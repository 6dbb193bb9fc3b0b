"""The service's figures, measured: `python serving/figures.py [NAME ...]`, all of them without a name.

The CPU reference model: 4 layers, 64 wide, chunks of 16, window of 8 chunks, 200,000 items, random weights (weights do
not change speed). It is written to `runs/reference` the first time. Needs the project installed; says the hardware.

    append     append one event and recommend, against computing the history anew, at 10^3, 10^4, 10^5 events
    memory     users per GB by measured bytes, against the formula and against a full K/V cache
    late       a late event, 10, 1,000 and 20,000 events back, in a history of 10^5
    http       /recommend at 100 requests/s and events at 1,000/s, IVF index, service and client on the same cores
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
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


def append_figures() -> None:
    """Append one event and recommend, against computing the history anew."""
    from ksa_serving.models import Question

    model = load_model()
    print("| events | append + recommend, ms (CPU) | anew + recommend, ms (CPU) | ratio of CPU |\n|---|---|---|---|")
    for length in (1000, 10_000, 100_000):
        events = history(length + 1)
        state = build(model, events[:-1])

        def one(state: Any = state, last: Any = events[-1]) -> None:
            model.recommend([Question(model.append(state, [last]), 10, T0 * 2)])

        def anew(events: list[Any] = events) -> None:
            model.recommend([Question(build(model, events), 10, T0 * 2)])

        fast, slow = milliseconds(one, 40), milliseconds(anew, 5 if length < 100_000 else 1)
        print(f"| {length:,} | {fast} | {slow} | {slow.cpu / fast.cpu:,.0f} |", flush=True)


def memory_figures() -> None:
    """Users per GB by the bytes of real states, against the formula and a full cache."""
    from recsys_ksa.model.state import full_kv_bytes, kv_bytes

    model = load_model()
    config = model.recommender.network.config
    print("| events | state K/V, bytes | formula | own items + fixed | users/GB | full cache users/GB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for length in (1000, 10_000, 100_000):
        state = build(model, history(length))
        parts = [rows for layer in state.memory.layers for rows in (layer.events, layer.summaries)]
        measured = sum(tensor.untyped_storage().nbytes() for rows in parts for tensor in (*rows.segments, rows.tail))
        formula, full = kv_bytes(config, length), full_kv_bytes(config, length)
        rest = state.seen_nbytes + state.fixed_nbytes
        users, full_users = 1e9 / (measured + rest), 1e9 / (full + rest)
        print(
            f"| {length:,} | {measured:,} | {formula:,} ({measured / formula - 1:+.1%}) | {rest:,} | {users:,.0f} | "
            f"{full_users:,.0f} | {users / full_users:.1f} |",
            flush=True,
        )


def late_figures() -> None:
    """A late event against rebuilding, in a history of 10^5."""
    from ksa_serving.events import StoredEvent
    from ksa_serving.models import START, Mark

    model = load_model()
    length = 100_000
    events = history(length)
    state = build(model, events)
    print("| a late event so many events back | replay, ms (CPU) |\n|---|---|")
    for back in (10, 1000, 20_000):
        kept = length - back
        late = StoredEvent(length + 1, "i1", events[kept].timestamp - 1, None, None, None)
        first = max(0, model.replay_start(kept) - 1)
        mark = Mark(first, START.history_hash)  # the hash's place does not change the time

        def replay(kept: int = kept, late: Any = late, first: int = first, mark: Any = mark) -> None:
            rewound = model.rewind(state, kept, first, events[first:kept], mark)
            for start in range(kept, length, 8192):
                part = events[start : start + 8192]
                rewound = model.append(rewound, [late, *part] if start == kept else part)

        print(f"| {back:,} | {milliseconds(replay, 5 if back < 20_000 else 1)} |", flush=True)


def http_figures(seconds: float = 10.0) -> None:
    """/recommend at 100 requests/s and events at 1,000/s over real HTTP."""
    import asyncio

    from ksa_serving.client import Client
    from ksa_serving.load import Plan, report, run_plan
    from ksa_serving.messages import EventMessage

    lengths = [100_000, *[10_000] * 2, *[1000] * 47, *[100] * 150]
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "ksa"), "serve", str(reference_run()), "--index", "ivf"]
        command += ["--port", "0", "--state-dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        try:
            with Client(url, timeout=120) as client:
                for user, length in enumerate(reversed(lengths)):
                    events = [EventMessage(event.item_id, event.timestamp) for event in history(length, user)]
                    for start in range(0, length, 1000):
                        client.keep(f"u{user}", events[start : start + 1000])
                began = time.perf_counter()
                while any(client.recommend(f"u{user}", k=1).degraded for user in range(len(lengths))):
                    time.sleep(1)
                print(f"all states built from the log: {time.perf_counter() - began:.0f} s")
                print(json.dumps({"longest": client.recommend(f"u{len(lengths) - 1}", k=1).num_events}))
            users = len(lengths)
            for title, plan in {
                "recommend 100/s": Plan(100, 1e-9, 1, users, NUM_ITEMS, seconds),
                "events 1,000/s, one a call": Plan(1e-9, 1000, 1, users, NUM_ITEMS, seconds, seed=1),
                "events 1,000/s, ten a call": Plan(1e-9, 1000, 10, users, NUM_ITEMS, seconds, seed=2),
                "recommend 50/s beside events 100/s": Plan(50, 100, 1, users, NUM_ITEMS, seconds, seed=3),
            }.items():
                print(f"{title}:")
                print("  " + "\n  ".join(report(asyncio.run(run_plan(url, None, plan)))), flush=True)
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


FIGURES = {"append": append_figures, "memory": memory_figures, "late": late_figures, "http": http_figures}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], default=[], help="which figures")
    names = parser.parse_args().names or list(FIGURES)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}, commit {commit}")
    for name in names:
        print(f"\n## {name}", flush=True)
        FIGURES[name]()


if __name__ == "__main__":
    main()
