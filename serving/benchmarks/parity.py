"""States kept up to date against states computed in one pass: `python serving/benchmarks/parity.py --seconds 600`.

Random networks of many shapes in float32, random histories. Each is led along by many states: in batches with states of
other histories, in arrivals of random sizes, from late events on, and made whole from cold records on the way. At some
lengths, of which many lie beside an edge of a chunk, each state is compared with the pass over its history at once,
which was computed and asked alone: every row to 1e-5 of its norm (an audit's bar), history, order and own items
exactly, and the hundred best items and their scores, but for scores that lie within 1e-5 of each other, relative to the
largest. A mistake is printed with the seed that replays it: `--seed S --networks 1`. Every network has a seed of its
own, so `--workers` changes which process compares, not what.
"""

import argparse
import multiprocessing
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from reference import T0, heading

NUM_ITEMS = 400
WITHIN = 1e-5
NUM_HISTORIES = 32
"""Of a network."""
NUM_LATE = NUM_EARLY = 8
"""States of a history that begin with a late event, or with none."""
NUM_LENGTHS = 8
"""At which the states of a history are compared, at most."""
MOST_ASKED = 64
"""States asked in one batch."""
COLD_SHARE = 0.2
"""Of the comparisons: those after which the state goes on as its cold record has it."""
SHAPES: list[dict[str, Any]] = [
    {},
    {"chunk_size": 4, "summaries_per_chunk": 2, "window_chunks": 1},
    {"chunk_size": 16, "window_chunks": 0},
    {"layers": ["summary", "full", "summary"]},
    {"attention": "window"},
    {"num_kv_heads": 1, "layers": ["summary"] * 4},
    {"max_visible_chunks": 3},
    {"chunk_size": 4, "session_gap": 3000, "calendar": ["hour", "weekday"], "request_calendar": ["hour"]},
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


@dataclass(frozen=True)
class Truth:
    """The state of one pass over a history, with what is asked of it and what it answers."""

    state: Any
    request_time: int
    hides: bool
    answer: list[tuple[str, float]]


@dataclass(frozen=True)
class Course:
    """A history and the lengths at which states are compared with the truth."""

    events: list[Any]
    truths: dict[int, Truth]

    def room(self, num_events: int) -> int:
        """Return how many events there are up to the next length."""
        return min(length for length in self.truths if length > num_events) - num_events


@dataclass
class Runner:
    """A state on its course, and how it was led to where it is."""

    course: Course
    state: Any
    way: str

    @property
    def arrived(self) -> bool:
        """Whether its history has no more events."""
        return self.state.num_events == len(self.course.events)


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


def make_course(model: Any, draw: random.Random) -> Course:
    """Return a random history with the truth of some lengths: its own, any, and such as are beside an edge."""
    from ksa_serving.models import Question

    events = make_history(draw, draw.choice([1, 7, 8, 9, *(draw.randint(1, 250) for _ in range(12))]))
    edges = range(model.chunk_size, len(events), model.chunk_size)
    beside = [edge + draw.randint(-1, 1) for edge in draw.sample(edges, min(len(edges), NUM_LENGTHS // 2))]
    anywhere = [draw.randint(1, len(events)) for _ in range(NUM_LENGTHS - 1 - len(beside))]
    truths: dict[int, Truth] = {}
    for length in sorted({*beside, *anywhere, len(events)}):
        state = model.append(model.new_state(), events[:length])
        now, hides = T0 + draw.randrange(10**6), draw.random() < 0.5
        truths[length] = Truth(state, now, hides, model.recommend([Question(state, 100, now, hides)])[0])
    return Course(events, truths)


def step(model: Any, groups: Sequence[Sequence[Runner]], draw: random.Random) -> list[Runner]:
    """Lead one runner on of some of the groups, in one batch; return those that reached a length to compare."""
    some = [draw.choice(group) for group in draw.sample(groups, draw.randint(1, len(groups)))]
    sizes = draw.choice([[1], [1, 2, 5], [1, 9, 60], [20, 250]])  # few events a user and many go different ways
    given = []
    for runner in some:
        had = runner.state.num_events
        given.append(runner.course.events[had : had + min(draw.choice(sizes), runner.course.room(had))])
    for runner, state in zip(some, model.append_batch([runner.state for runner in some], given)):
        runner.state = state
    return [runner for runner in some if runner.state.num_events in runner.course.truths]


def after_late_events(model: Any, courses: Sequence[Course], draw: random.Random) -> list[Runner]:
    """Return runners, each at a length of its course, of whose events some came last: rewound and appended to again."""
    from ksa_serving.models import START

    ends = [draw.choice([length for length in course.truths if is_whole(model, length)]) for course in courses]
    late = [sorted(draw.sample(range(end), min(end, draw.choice([1, 1, 3])))) for end in ends]
    others = [
        [event for place, event in enumerate(course.events[:end]) if place not in places]
        for course, end, places in zip(courses, ends, late)
    ]
    before = [model.new_state() for _ in courses]
    some = [at for at, events in enumerate(others) if events]
    for at, state in zip(some, model.append_batch([before[at] for at in some], [others[at] for at in some])):
        before[at] = state if draw.random() < 0.5 else model.load(model.dump(state))
    rewound = [
        model.rewind(state, first, 0, course.events[:first], START)
        for state, course, (first, *_) in zip(before, courses, late)
    ]
    again = [course.events[first:end] for course, end, (first, *_) in zip(courses, ends, late)]
    return [
        Runner(course, model.with_own_items(state, old, [course.events[place] for place in places]), "late")
        for course, state, old, places in zip(courses, model.append_batch(rewound, again), before, late)
    ]


def is_whole(model: Any, num_events: int) -> bool:
    """Return whether a state of so many events has all its summaries, as it takes to be rewound."""
    from recsys_ksa.model.state import first_visible_chunk

    return first_visible_chunk(model.recommender.network.config, num_events) == 0


def made_whole(model: Any, state: Any, events: list[Any]) -> Any:
    """Return the state of these events as it is made from its cold record."""
    from ksa_serving.models import Mark

    total = len(events)
    cold = model.load(model.dump(state))
    first = max(0, model.replay_start(total) - 1)
    whole = model.rewind(cold, total, first, events[first:], Mark(total, state.history_hash))
    return model.with_own_items(whole, cold, [])


def same_answers(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> bool:
    """Return whether the items are the same, in the same order but for near ties, with the same scores."""
    if len(found) != len(expected):
        return False
    if not found:
        return True
    items, scores = zip(*found)
    wanted, others = zip(*expected)
    score_of = dict(expected)
    at_hand = others if items == wanted else [score_of.get(item, others[-1]) for item in items]
    near = np.subtract(scores, [others, at_hand])
    return bool((np.abs(near) <= WITHIN * np.abs(others).max()).all())


def check(model: Any, reached: Sequence[Runner], draw: random.Random, found: Found) -> None:
    """Compare states with the truth of where they are, asked in batches of some."""
    from ksa_serving.models import Question

    start = 0
    while some := reached[start : start + draw.randint(1, MOST_ASKED)]:
        start += len(some)
        truths = [runner.course.truths[runner.state.num_events] for runner in some]
        asked = [Question(runner.state, 100, truth.request_time, truth.hides) for runner, truth in zip(some, truths)]
        for runner, truth, answer in zip(some, truths, model.recommend(asked)):
            found.ways[runner.way] += 1
            difference = model.difference(runner.state, truth.state)
            if not difference <= WITHIN:
                found.wrong.append(f"{runner.way}: rows differ by {difference:.1e}")
            elif not same_answers(answer, truth.answer):
                found.wrong.append(f"{runner.way}: other answers")


def lead(model: Any, runners: Sequence[Runner], draw: random.Random) -> Iterator[Runner]:
    """Lead runners to the ends of their courses, some of them through cold records; yield them where they compare."""
    of_course: defaultdict[int, list[Runner]] = defaultdict(list)
    for runner in runners:
        of_course[id(runner.course)].append(runner)
    groups = list(of_course.values())
    # A batch never has two states of one history: one in the place of another would pass.
    while groups := [left for group in groups if (left := [one for one in group if not one.arrived])]:
        for runner in step(model, groups, draw):
            yield replace(runner)
            length = runner.state.num_events
            if draw.random() < COLD_SHARE and is_whole(model, length):
                runner.state = made_whole(model, runner.state, runner.course.events[:length])
                yield replace(runner, way="cold")


def compare(run: Any, seed: int, num_histories: int = NUM_HISTORIES) -> Found:
    """Compare many states of one network."""
    draw = random.Random(seed)
    model = make_model(run, draw)
    found = Found(seed)
    courses = [make_course(model, draw) for _ in range(num_histories)]
    rewound = [course for course in courses if any(is_whole(model, length) for length in course.truths)]
    late = [runner for _ in range(NUM_LATE) for runner in after_late_events(model, rewound, draw)]
    early = [Runner(course, model.new_state(), "arrivals") for course in courses for _ in range(NUM_EARLY)]
    reached = [replace(runner) for runner in late]
    for runner in late:
        runner.way = "arrivals after a late event"
    reached += lead(model, [*early, *late], draw)
    draw.shuffle(reached)
    check(model, reached, draw, found)
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
