"""Do explanations name the chunk that counts, and at what cost: `python serving/benchmarks/explanations.py RUN DATA`.

For items drawn from the ten best of each history's answer: the chunk that the explanation names first, against another
chunk of the history drawn at random. Each of the two is removed, and the score computed anew in two ways that share no
arithmetic with the explanation:

masked      one dense pass in which no later event or summary sees the chunk in any block (`attribution_reference`),
            and the gain of an own item counted over the other events
deleted     the library, from a history without the chunk's events: later ones move up, and own items are counted anew

Told is how often the first chunk changes the score more, beside that of the newest chunk (which needs no explanation)
and of the most attended; then what an explanation takes, against a score of the same item, both over HTTP. A run and
its data set, for example: `ksa demo --out runs/demo`, then `runs/demo/ksa runs/demo/data`.

`--lengths 1000 10000 100000`, without a run: what both take for the reference model and random histories of such
lengths, of items that the user has met.
"""

import argparse
import contextlib
import random
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from cold_rows import real_histories
from reference import heading, history, milliseconds, reference_run


class Removals:
    """One history with each chunk removed in turn, both ways; what was computed once is kept."""

    def __init__(self, model: Any, events: list[Any], now: int):
        from ksa_serving.attribution_reference import MaskedHistory

        self._model, self._events, self._now = model, events, now
        self._plain = MaskedHistory(model.recommender, events, now)
        self.num_chunks = self._plain.num_chunks
        self.state = model.append(model.new_state(), events)
        self._vector, self._rest = cache(self._plain.user_vector), cache(self._without)

    def masked(self, chunk: int, item: str) -> float:
        """Return how much the network's score and the own item's gain change together."""
        recommender = self._model.recommender
        row = recommender.run.items.index_of[item]
        change = self._vector(None) - self._vector(chunk)
        gains = [self._gain(events, item) for events in (self._events, self._others(chunk))]
        return abs(float(change.numpy() @ recommender.item_vectors[row]) + gains[0] - gains[1])

    def deleted(self, chunk: int, item: str) -> float:
        """Return how much the library's score changes, own items' counts included."""
        (before,), (after,) = (self._model.score(state, [item], self._now) for state in (self.state, self._rest(chunk)))
        return abs(before - after)

    def _without(self, chunk: int) -> Any:
        return self._model.append(self._model.new_state(), self._others(chunk))

    def _others(self, chunk: int) -> list[Any]:
        k = self._model.chunk_size
        return self._events[: chunk * k] + self._events[(chunk + 1) * k :]

    def _gain(self, events: list[Any], item: str) -> float:
        """Return what the item gains by being in `events`, by the score of a state that has these as own items."""
        states = [self._model.with_own_items(self.state, None, own) for own in (events, [])]
        with_own, without = (self._model.score(state, [item], self._now)[0] for state in states)
        return with_own - without


def measure_changes(model: Any, histories: list[list[Any]], pairs: int, draw: random.Random) -> None:
    """Print how often the chunk named first changes a score more than another one."""
    from tqdm import tqdm

    from ksa_serving.events import Meeting
    from ksa_serving.models import Question

    won: Counter[tuple[str, str]] = Counter()
    drawn = own = 0
    for events in tqdm(histories, unit=" histories"):
        now = events[-1].timestamp + draw.randrange(3600, 14 * 86_400)
        removals = Removals(model, events, now)
        ways = {"masked": removals.masked, "deleted": removals.deleted}
        (best,) = model.recommend([Question(removals.state, 10, now)])
        for item, _ in draw.sample(best, min(-(-pairs // len(histories)), len(best))):
            met = [Meeting(place, event.timestamp) for place, event in enumerate(events) if event.item_id == item]
            own += bool(met)
            reasons = model.explain(removals.state, events[-model.num_newest :], met, item, now, 5)
            named = {
                "named first": reasons[0].first // model.chunk_size,
                "most attended": max(reasons, key=lambda reason: reason.attention).first // model.chunk_size,
                "newest": removals.num_chunks - 1,
            }
            for name, chunk in named.items():
                other = draw.choice([one for one in range(removals.num_chunks) if one != chunk])
                for way, change in ways.items():
                    won[name, way] += change(chunk, item) > change(other, item)
            drawn += 1
    print(f"\n{drawn} pairs, {own} of them of own items, {len(histories)} histories of {len(histories[0])} events\n")
    print("| A chunk's change is larger than a random one's | masked | deleted |\n|---|---|---|")
    for name in ("named first", "most attended", "newest"):
        print(f"| {name} | {won[name, 'masked'] / drawn:.1%} | {won[name, 'deleted'] / drawn:.1%} |")


def measure_cost(run: Path, events: list[Any], draw: random.Random) -> None:
    """Print what `/explain` takes against `/score`, over HTTP, of items of one user whose state is held."""
    from live_service import started

    from ksa_serving.client import Client
    from ksa_serving.messages import EventMessage

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        service = stack.enter_context(started(run, Path(folder), "--set", "user_events_per_second=0"))
        client = stack.enter_context(Client(service.url, timeout=300))
        given = [EventMessage(event.item_id, event.timestamp) for event in events]
        for start in range(0, len(given), 1000):
            client.keep("ann", given[start : start + 1000])
        now = events[-1].timestamp + 3600
        while (best := client.recommend("ann", k=10, request_time=now, list="again")).degraded:
            time.sleep(1)
        items = [one.item_id for one in best.items]

        def explain() -> None:
            client.explain("ann", draw.choice(items), request_time=now)

        def score() -> None:
            client.score("ann", [draw.choice(items)], request_time=now)

        took: dict[str, list[float]] = {"explain": [], "score": []}
        for turn in range(320):  # one after the other, so that both meet the same neighbours
            for name, work in (("explain", explain), ("score", score)):
                spent = milliseconds(work, 1).wall
                took[name] += [spent] * (turn >= 20)
    halves = [[median(took[name][at::2]) for name in ("score", "explain")] for at in (0, 1)]
    for scored, explained in ([median(times) for times in zip(*halves)], *halves):
        ratio = f"{explained / scored:.1f} times"
        print(f"\n{len(events)} events: /score {scored:.1f} ms, /explain {explained:.1f} ms: {ratio}", flush=True)


def main() -> None:
    """Measure both."""
    from ksa_serving.library_model import LibraryModel
    from recsys_ksa.recommender import Recommender

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a trained run")
    parser.add_argument("data", type=Path, nargs="?", help="the prepared data set its histories come from")
    parser.add_argument("--events", type=int, default=700, help="of each history")
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--only", choices=["changes", "cost"], help="one of the two")
    parser.add_argument("--lengths", type=int, nargs="+", help="cost alone, of such random histories; needs no run")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    if args.lengths is not None:
        print(f"{heading()}, seed {args.seed}", flush=True)
        for length in args.lengths:
            measure_cost(reference_run(), history(length), draw)
        return
    if args.data is None:
        parser.error("expected a run and its data set, or --lengths.")
    model = LibraryModel(Recommender.load(args.run))
    histories = real_histories(args.data, args.events, args.histories)
    print(f"{heading()}, seed {args.seed}", flush=True)
    if args.only != "cost":
        measure_changes(model, histories, args.pairs, draw)
    if args.only != "changes":
        measure_cost(args.run, histories[0], draw)


if __name__ == "__main__":
    main()
