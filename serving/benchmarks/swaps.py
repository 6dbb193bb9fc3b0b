"""Releases change under load: `python serving/benchmarks/swaps.py`, service and client on the same cores.

Two releases of the reference model's shape with other weights each; what each answers every user when it is served
alone is taken down first. Then come questions in an open loop at 70% of capacity: for a while nothing else, then one
turn after the other: the other release is loaded, activated, and rolled back from. The first load also makes the states
of all users, later ones find them. Every answer is held against what the release that it names answered alone.
"""

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import httpx
import msgspec
import uvloop
from live_service import NUM_USERS, LiveService, live_service, parser
from overload import FIRST_RATES, find_capacity
from reference import heading, other_run, reference_run

from ksa_serving.client import Client
from ksa_serving.load import Wire
from ksa_serving.messages import RecommendAnswer

REQUEST_TIME = 1_750_000_000
ALONE_K = 100
"""Items taken down; more than are asked for, for near ones may change places between batches of other sizes."""
SCORE_TOLERANCE = 1e-4
"""Of a score that belongs to another release next to none would be so near."""
AFTER_SECONDS = 0.5
"""So long after it was called an activation counts as under way."""

Alone = dict[tuple[str, str], list[dict[str, float]]]
"""By model and index version: each user's items and scores."""


@dataclass(frozen=True)
class Met:
    """One question: when it was due, on `time.perf_counter`'s clock; how long it took; status and answer."""

    user: int
    due: float
    seconds: float
    status: int
    body: bytes


@dataclass(frozen=True)
class Change:
    """One call of the operator."""

    name: str
    begin: float
    end: float

    def covers(self, met: Met) -> bool:
        """Return whether a question was due during it, or right after an activation."""
        return self.begin <= met.due < self.end + (0 if "load" in self.name else AFTER_SECONDS)


def alone(service: LiveService) -> Alone:
    """Return what the one release served answers every user."""
    found: Alone = {}
    with Client(service.url, timeout=300) as client:
        answers = [client.recommend(f"u{user}", k=ALONE_K, request_time=REQUEST_TIME) for user in range(NUM_USERS)]
    versions = {(answer.model_version, answer.index_version) for answer in answers}
    assert len(versions) == 1
    found[versions.pop()] = [{item.item_id: item.score for item in answer.items} for answer in answers]
    return found


async def ask(service: LiveService, rate: float, over: asyncio.Event) -> list[Met]:
    """Ask about users drawn by Zipf's law until it is over; return what was met."""
    wire = Wire(service.url, None)
    await wire.open()
    question = json.dumps({"k": 10, "request_time": REQUEST_TIME}).encode()
    weights = list(accumulate(1 / (rank + 1) for rank in range(NUM_USERS)))
    met: list[Met] = []
    begin, sent = time.perf_counter(), 0
    while not over.is_set():
        due = begin + sent / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        (user,) = random.choices(range(NUM_USERS), cum_weights=weights)

        def answered(status: int, body: bytes, user: int = user, due: float = due) -> None:
            met.append(Met(user, due, time.perf_counter() - due, status, body))

        wire.post(f"/v1/users/u{user}/recommend", question, answered)
        sent += 1
    while len(met) < sent:
        await asyncio.sleep(0.01)
    wire.close()
    return met


async def change(service: LiveService, turns: int, quiet_seconds: float, over: asyncio.Event) -> list[Change]:
    """Be quiet; then load the other release, activate it and roll back, so often."""
    changes: list[Change] = []
    async with httpx.AsyncClient(base_url=service.admin, timeout=600) as http:

        async def call(path: str, name: str, **body: str) -> None:
            begin = time.perf_counter()
            (await http.post(f"/admin/{path}", json=body or None)).raise_for_status()
            changes.append(Change(name, begin, time.perf_counter()))
            await asyncio.sleep(2 * AFTER_SECONDS)

        await asyncio.sleep(quiet_seconds)
        for turn in range(turns):
            await call("load", "load again" if turn else "first load", run=other_run().name)
            await call("activate", "activate", run=other_run().name)
            await call("rollback", "rollback")
            print(f"turn {turn + 1} of {turns}: loaded in {changes[-3].end - changes[-3].begin:.1f} s", flush=True)
    over.set()
    return changes


async def storm(service: LiveService, args: object, rate: float) -> tuple[list[Met], list[Change]]:
    """Return what questions met and what the operator did meanwhile."""
    over = asyncio.Event()
    met, changes = await asyncio.gather(
        ask(service, rate, over), change(service, vars(args)["turns"], vars(args)["seconds"], over)
    )
    return met, changes


def fault(met: Met, alone: Alone) -> str:
    """Return what is wrong with an answer; empty where it is what the release that it names answers alone."""
    if met.status != 200:
        return f"status {met.status}"
    answer = msgspec.json.decode(met.body, type=RecommendAnswer)
    if answer.degraded:
        return "degraded"
    users = alone.get((answer.model_version, answer.index_version))
    if users is None:
        return "mixed: names model and index of no one release"
    scores = users[met.user]
    near = (abs(item.score - scores.get(item.item_id, float("inf"))) < SCORE_TOLERANCE for item in answer.items)
    return "" if all(near) and len(answer.items) == 10 else "mixed: other items or scores than the release it names"


def report(met: list[Met], changes: list[Change], alone: Alone) -> None:
    """Print latencies by what was under way, and what was wrong."""
    begun = changes[0].begin
    rows = {"before the first": [one for one in met if one.due < begun]}
    for name in ("first load", "load again", "activate", "rollback"):
        if not (spans := [change for change in changes if change.name == name]):
            continue
        rows[name] = [one for one in met if any(span.covers(one) for span in spans)]
        took = sorted(span.end - span.begin for span in spans)
        print(f"  {name}: {len(spans)}, in median {1000 * took[len(took) // 2]:.0f}, at most {1000 * took[-1]:.0f} ms")
    rows["all from the first on"] = [one for one in met if one.due >= begun]
    base = 0.0
    for name, some in rows.items():
        times = sorted(one.seconds for one in some if one.status == 200)
        p50, p99 = (1000 * times[int(share * len(times))] for share in (0.5, 0.99))
        base = base or p99
        statuses = ", ".join(f"{status}: {n}" for status, n in sorted(Counter(one.status for one in some).items()))
        print(f"  {name}: p50 {p50:.1f}, p99 {p99:.1f} ms ({p99 / base:.1f} times); {statuses}")
    faults = Counter(fault(one, alone) for one in met)
    print(f"  {len(met)} questions: {faults.pop('')} as the release they name alone; {dict(faults) or 'no others'}")


def main() -> None:
    """Take down what each answers, then storm."""
    made = parser(__doc__)
    made.add_argument("--turns", type=int, default=10, help="each an activation and a rollback")
    made.add_argument("--rate", type=float, help="questions a second; without it 70%% of the capacity, which is found")
    args = made.parse_args()
    print(heading(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        args.state_dir = args.state_dir or Path(name)
        with live_service(args, other_run()) as service:
            known = alone(service)
        (args.state_dir / "cold.lmdb").unlink(missing_ok=True)  # a release that comes has no states yet
        with live_service(args, reference_run()) as service:
            known |= alone(service)
            rate = args.rate or 0.7 * find_capacity(service, "recommend", FIRST_RATES["recommend"], args.seconds)
            print(f"{rate:.0f} questions a second", flush=True)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                met, changes = runner.run(storm(service, args, rate))
    report(met, changes, known)


if __name__ == "__main__":
    main()
