"""Many users at once, without HTTP: `python serving/benchmarks/batches.py [--device cuda] [--users 64 512]`.

One event appended to each user's state, then the ten best of 200,000 items for each: what one batch of the service
costs. Latency is a batch's, requests/s are users a batch over its median. Histories are eight distinct ones, repeated,
each user's rows apart; states are on the device, in tensors of their own or (on an accelerator) in pages; items are
searched there exactly. `new` leaves own items out, `all` scores them too. Every append goes on from the one before.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

from reference import NUM_ITEMS, T0, build, heading, history, reference_run

DISTINCT = 8
POOL_BYTES = 8 * 1024**3


def load_model(device: str, pool_bytes: int | None = None) -> Any:
    """Return the reference model on a device, its items there too; states in pages of `pool_bytes`, or in tensors."""
    import torch

    from ksa_serving.library_model import LibraryModel
    from recsys_ksa.recommender import Recommender
    from recsys_ksa.retrieval.index import TorchIndex

    recommender = Recommender.load(reference_run(), device=device, pool_bytes=pool_bytes)
    recommender.index = TorchIndex(torch.from_numpy(recommender.item_vectors).to(device))
    return LibraryModel(recommender)


def timed(work: Callable[[], object], times: int, device: str) -> list[float]:
    """Return how long each of some calls takes, sorted, in milliseconds."""
    import torch

    taken: list[float] = []
    for turn in range(times + 3):  # the first ones compile and warm up
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        if turn >= 3:
            taken.append(1000 * (time.perf_counter() - began))
    return sorted(taken)


def apart(model: Any, state: Any) -> Any:
    """Return a state that shares no row with the one given."""
    from recsys_ksa.model.state import LayerState, Memory, SharedRows

    def own(rows: SharedRows) -> SharedRows:
        return SharedRows(tuple(segment.clone() for segment in rows.segments), rows.tail.clone())

    memory, pool = state.memory, model.recommender.pool
    layers = tuple(LayerState(layer.kind, own(layer.events), own(layer.summaries)) for layer in memory.layers)
    copy = Memory(memory.num_events, layers, memory.last_input.clone())
    return replace(state, memory=copy if pool is None else pool.hold(copy))


def steps(model: Any, states: list[Any], length: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    from ksa_serving.events import StoredEvent
    from ksa_serving.models import Question

    now = T0 * 2
    new = [[StoredEvent(length + 1, f"i{n % NUM_ITEMS + 1}", now, None, None, None)] for n in range(len(states))]

    def ask(held: list[Any], exclude_seen: bool) -> object:
        return model.recommend([Question(state, 10, now + 60, exclude_seen=exclude_seen) for state in held])

    def append() -> list[Any]:
        states[:] = model.append_batch(states, new)
        return states

    return {
        "append": append,
        "recommend new": lambda: ask(states, True),
        "recommend all": lambda: ask(states, False),
        "append + recommend new": lambda: ask(append(), True),
    }


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--users", type=int, nargs="+", default=[64, 512], help="users a batch")
    parser.add_argument("--events", type=int, nargs="+", default=[1000, 10_000], help="events of each history")
    parser.add_argument("--repeats", type=int, default=50, help="batches timed")
    args = parser.parse_args()
    print(heading(args.device))
    print("| rows in | events | users a batch | step | p50, ms | p99, ms | requests/s |\n|---|---|---|---|---|---|---|")
    for kept in ("tensors",) if args.device == "cpu" else ("tensors", "pages"):
        model = load_model(args.device, POOL_BYTES if kept == "pages" else None)
        for length in args.events:
            built = [build(model, history(length, seed)) for seed in range(DISTINCT)]
            for users in args.users:
                states = [apart(model, state) for state in islice(cycle(built), users)]
                gc.collect()
                gc.freeze()  # as the service does
                for name, work in steps(model, states, length).items():
                    taken = timed(work, args.repeats, args.device)
                    p50, p99 = taken[len(taken) // 2], taken[min(len(taken) - 1, int(0.99 * len(taken)))]
                    told = f"{p50:,.2f} | {p99:,.2f} | {1000 * users / p50:,.0f}"
                    print(f"| {kept} | {length:,} | {users} | {name} | {told} |", flush=True)


if __name__ == "__main__":
    main()
