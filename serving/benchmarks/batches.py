"""Many users at once, without HTTP: `python serving/benchmarks/batches.py [--device cuda] [--users 64 512]`.

One event appended to each user's state, then the ten best of 200,000 items for each: what one batch of the service
costs. Latency is a batch's, requests/s are users a batch over its median. Histories are eight distinct ones, repeated;
states are on the device, items are searched there exactly. `new` leaves own items out, `all` scores them too.
"""

import argparse
import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

from reference import NUM_ITEMS, T0, build, heading, history, reference_run

DISTINCT = 8


def load_model(device: str) -> Any:
    """Return the reference model on a device, its items there too."""
    import torch

    from ksa_serving.library_model import LibraryModel
    from recsys_ksa.recommender import Recommender
    from recsys_ksa.retrieval.index import TorchIndex

    recommender = Recommender.load(reference_run(), device=device)
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


def steps(model: Any, states: list[Any], length: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    from ksa_serving.events import StoredEvent
    from ksa_serving.models import Question

    now = T0 * 2
    new = [[StoredEvent(length + 1, f"i{n % NUM_ITEMS + 1}", now, None, None, None)] for n in range(len(states))]

    def ask(held: list[Any], exclude_seen: bool) -> object:
        return model.recommend([Question(state, 10, now + 60, exclude_seen=exclude_seen) for state in held])

    return {
        "append": lambda: model.append_batch(states, new),
        "recommend new": lambda: ask(states, True),
        "recommend all": lambda: ask(states, False),
        "append + recommend new": lambda: ask(model.append_batch(states, new), True),
    }


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--users", type=int, nargs="+", default=[64, 512], help="users a batch")
    parser.add_argument("--events", type=int, nargs="+", default=[1000, 10_000], help="events of each history")
    parser.add_argument("--repeats", type=int, default=50, help="batches timed")
    args = parser.parse_args()
    model = load_model(args.device)
    print(heading(args.device))
    print("| events | users a batch | step | p50, ms | p99, ms | requests/s |\n|---|---|---|---|---|---|")
    for length in args.events:
        built = [build(model, history(length, seed)) for seed in range(DISTINCT)]
        for users in args.users:
            for name, work in steps(model, list(islice(cycle(built), users)), length).items():
                taken = timed(work, args.repeats, args.device)
                p50, p99 = taken[len(taken) // 2], taken[min(len(taken) - 1, int(0.99 * len(taken)))]
                row = f"| {length:,} | {users} | {name} | {p50:,.2f} | {p99:,.2f} | {1000 * users / p50:,.0f} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
