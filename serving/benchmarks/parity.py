"""States kept up to date against states computed in one pass: `python serving/benchmarks/parity.py --seconds 600`.

Random networks of many shapes in float32, random histories. Each state is led to its history some way round: in batches
with other users' states, in arrivals of random sizes, through late events, made whole from a cold record, or made whole
and then appended to. One comparison is one such state against the pass over its history at once: every row to 1e-5 of
its norm (an audit's bar), history, order and own items exactly, and the hundred best items and their scores, but for
scores that lie within 1e-5 of each other, relative to the largest. A mistake is printed with the seed that replays it:
`--seed S --networks 1`. Every network has a seed of its own, so `--workers` changes which process compares, not what.
"""

import argparse
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reference import T0, heading

NUM_ITEMS = 400
WITHIN = 1e-5
SHAPES: list[dict[str, Any]] = [
    {},
    {"chunk_size": 4, "summaries_per_chunk": 2, "window_chunks": 1},
    {"chunk_size": 16, "window_chunks": 0},
    {"layers": ["summary", "full", "summary"]},
    {"attention": "window"},
    {"num_kv_heads": 1, "layers": ["summary"] * 4},
]


@dataclass
class Found:
    """What was compared of one network.

    ways: comparisons by the way states were led to their histories.
    wrong: what each of those that failed has wrong.
    """

    seed: int
    ways: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def make_model(run: Any, draw: random.Random) -> Any:
    """Return a random network of a random shape over a run's items."""
    import torch

    from ksa_serving.library_model import LibraryModel
    from recsys_ksa.config import ModelConfig
    from recsys_ksa.model.network import Network
    from recsys_ksa.recommender import Recommender
    from recsys_ksa.retrieval.index import TorchIndex

    torch.manual_seed(draw.randrange(2**31))
    config = ModelConfig.model_validate({**run.config.model.model_dump(), **draw.choice(SHAPES)})
    network = Network(config, run.features).eval().requires_grad_(False)
    return LibraryModel(Recommender(run, network, TorchIndex(network.item_vectors())))


def make_history(draw: random.Random, length: int) -> list[Any]:
    """Return a history in order; half of the times are ties."""
    from ksa_serving.events import StoredEvent

    times = sorted(T0 + draw.randrange(2 * length + 1) * 1000 for _ in range(length))
    return [
        StoredEvent(n, f"i{draw.randrange(NUM_ITEMS + 20)}", time, None, None, None) for n, time in enumerate(times)
    ]


def in_arrivals(model: Any, histories: list[list[Any]], draw: random.Random) -> list[Any]:
    """Return states after arrivals of random sizes, of some of the users at a time."""
    states = [model.new_state() for _ in histories]
    while left := [at for at, (state, whole) in enumerate(zip(states, histories)) if state.num_events < len(whole)]:
        some = draw.sample(left, draw.randint(1, len(left)))
        counts = [draw.choice([1, 1, 2, 9, 60]) for _ in some]
        given = [histories[at][states[at].num_events :][:count] for at, count in zip(some, counts)]
        for at, state in zip(some, model.append_batch([states[at] for at in some], given)):
            states[at] = state
    return states


def with_a_late_event(model: Any, events: list[Any], draw: random.Random) -> Any:
    """Return the state where one event came last, rewound and appended to again."""
    from ksa_serving.models import START

    at = draw.randrange(len(events))
    at = next(place for place, event in enumerate(events) if event.timestamp == events[at].timestamp)
    late, others = events[at], events[:at] + events[at + 1 :]
    before = model.append(model.new_state(), others)
    if draw.random() < 0.5:
        before = model.load(model.dump(before))
    rewound = model.rewind(before, at, 0, events[:at], START)
    return model.with_own_items(model.append(rewound, events[at:]), before, [late])


def made_whole(model: Any, events: list[Any], draw: random.Random) -> Any:
    """Return the state made from a cold record of a first part, with the rest appended."""
    from ksa_serving.models import Mark

    count = draw.randint(1, len(events))
    state = model.append(model.new_state(), events[:count])
    cold = model.load(model.dump(state))
    first = max(0, model.replay_start(count) - 1)
    whole = model.rewind(cold, count, first, events[first:count], Mark(count, state.history_hash))
    whole = model.with_own_items(whole, cold, [])
    return model.append(whole, events[count:]) if count < len(events) else whole


def same_answers(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> bool:
    """Return whether the items are the same, in the same order but for near ties, with the same scores."""
    within = WITHIN * max((abs(score) for _, score in expected), default=0.0)
    scores = dict(expected)
    last = expected[-1][1] if expected else 0.0
    return len(found) == len(expected) and all(
        abs(score - other) <= within and abs(score - scores.get(item, last)) <= within
        for (item, score), (_, other) in zip(found, expected)
    )


def compare(run: Any, seed: int) -> Found:
    """Compare some users' states of one network."""
    from ksa_serving.models import Question

    draw = random.Random(seed)
    model = make_model(run, draw)
    found = Found(seed)
    for _ in range(8):
        histories = [make_history(draw, draw.choice([1, 7, 8, 9, draw.randint(1, 250)])) for _ in range(12)]
        expected = [model.append(model.new_state(), events) for events in histories]
        states = {
            "arrivals": in_arrivals(model, histories, draw),
            "late": [with_a_late_event(model, events, draw) for events in histories],
            "cold": [made_whole(model, events, draw) for events in histories],
        }
        now, hides = T0 + draw.randrange(10**6), draw.random() < 0.5
        wanted = model.recommend([Question(state, 100, now, hides) for state in expected])
        for way, reached in states.items():
            answers = model.recommend([Question(state, 100, now, hides) for state in reached])
            for mine, theirs, answer, other in zip(reached, expected, answers, wanted):
                found.ways[way] += 1
                difference = model.difference(mine, theirs)
                if difference > WITHIN:
                    found.wrong.append(f"{way}: rows differ by {difference:.1e}")
                elif not same_answers(answer, other):
                    found.wrong.append(f"{way}: other answers")
    return found


_run: Any = None
"""A worker's run."""


def begin_worker(path: Path) -> None:
    """Open the run in a worker."""
    import torch

    from recsys_ksa.run import open_run

    global _run
    torch.set_num_threads(1)
    _run = open_run(path)


def compare_in_worker(seed: int) -> Found:
    """Compare in a worker that has begun."""
    return compare(_run, seed)


def compare_all(path: Path, seeds: Iterator[int], workers: int) -> Iterator[Found]:
    """Compare networks in several processes, one a seed; no more are begun than are under way."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=begin_worker, initargs=(path,)) as pool:
        under_way = {pool.submit(compare_in_worker, seed) for seed in islice(seeds, 2 * workers)}
        while under_way:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            under_way |= {pool.submit(compare_in_worker, seed) for seed in islice(seeds, len(done))}
            yield from (one.result() for one in done)


def main() -> None:
    """Compare for some time, and count."""
    from tqdm import tqdm

    from recsys_ksa.testing import random_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no network after so many")
    parser.add_argument("--comparisons", type=int, help="begin no network after so many")
    parser.add_argument("--networks", type=int, help="compare so many, however long it takes")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of the first network")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args()
    ways: Counter[str] = Counter()
    networks = wrong = 0
    print(f"{heading()}, seed {args.seed}, {args.workers} workers", flush=True)

    def seeds() -> Iterator[int]:
        end = time.monotonic() + args.seconds
        for seed in count(args.seed) if args.networks is None else range(args.seed, args.seed + args.networks):
            if args.networks is None and time.monotonic() > end:
                return
            if args.comparisons is not None and ways.total() >= args.comparisons:
                return
            yield seed

    start = time.monotonic()
    with TemporaryDirectory() as folder, tqdm(unit=" comparisons", disable=None) as bar:
        path = random_run(Path(folder, "run"), NUM_ITEMS, ['model.layers=["summary","summary"]'])
        for found in compare_all(path, seeds(), args.workers):
            ways += found.ways
            networks += 1
            wrong += len(found.wrong)
            for mistake in found.wrong:
                print(f"--seed {found.seed} --networks 1: {mistake}", flush=True)
            bar.update(ways.total() - bar.n)
    told = ", ".join(f"{way} {times:,}" for way, times in sorted(ways.items()))
    rate = ways.total() / (time.monotonic() - start)
    print(f"{ways.total():,} comparisons ({told}) of {networks} networks, {rate:,.0f} a second: {wrong} failures")
    raise SystemExit(1 if wrong or not networks else 0)


if __name__ == "__main__":
    main()
