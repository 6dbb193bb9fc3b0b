"""`ksa load`: an open-loop load generator. Requests leave when they are due, whether earlier ones were answered or not.

So a service that falls behind shows it as latency, counted from when the request was due. Users are drawn by Zipf's
law; requests travel on kept connections over plain sockets, so that the generator costs little beside the service.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from urllib.parse import quote, urlsplit

from recsys_ksa.cli import Verb
from recsys_ksa.errors import UsageError


@dataclass
class Outcome:
    """What one kind of request met: latencies in seconds and counts by status; 0 is a broken connection."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def percentile(self, share: float) -> float:
        """Return the latency, in milliseconds, that this share of the requests stayed within."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Wire:
    """Kept connections to one service."""

    def __init__(self, url: str, token: str | None):
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise UsageError(f"ksa load: --url: expected http://HOST:PORT, got {url!r}.")
        self._host, self._port = parts.hostname, parts.port or 80
        authorization = f"authorization: Bearer {token}\r\n" if token else ""
        self._head = f" HTTP/1.1\r\nhost: {parts.netloc}\r\n{authorization}content-type: application/json\r\n"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body."""
        while self._idle and self._idle[-1][1].is_closing():
            self._idle.pop()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(f"POST {path}{self._head}content-length: {len(body)}\r\n\r\n".encode() + body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            content = await reader.readexactly(int(length.split(b":")[1]))
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in head.lower():
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head[9:12]), content

    def close(self) -> None:
        """Close all connections."""
        for _, writer in self._idle:
            writer.close()


@dataclass(frozen=True)
class Plan:
    """What to send. Rates a second; `items` ids i1..iN; users u0..uN-1, drawn by Zipf's law with this exponent."""

    recommend_rate: float
    events_rate: float
    events_per_call: int
    users: int
    items: int
    seconds: float
    zipf: float = 1.0
    k: int = 10
    seed: int = 0


async def run_plan(url: str, token: str | None, plan: Plan) -> dict[str, Outcome]:
    """Send a plan's requests when they are due; return what each kind met."""
    wire = Wire(url, token)
    draw = random.Random(plan.seed)
    weights = list(accumulate(1 / (rank + 1) ** plan.zipf for rank in range(plan.users)))
    outcomes = {"recommend": Outcome(), "events": Outcome()}
    due = [(n / plan.recommend_rate, "recommend") for n in range(int(plan.seconds * plan.recommend_rate))]
    calls = plan.events_rate / plan.events_per_call
    due += [(n / calls + 1e-4, "events") for n in range(int(plan.seconds * calls))]
    begin = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()
    for number, (at, kind) in enumerate(sorted(due)):
        user = draw.choices(range(plan.users), cum_weights=weights)[0]
        body: dict[str, Any] = {"k": plan.k}
        if kind == "events":
            now = int(time.time())
            events = [
                {
                    "item_id": f"i{draw.randint(1, plan.items)}",
                    "timestamp": now,
                    "event_id": f"{plan.seed}-{number:09}-{n}",
                }
                for n in range(plan.events_per_call)
            ]
            body = {"events": events}
        wait = begin + at - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        path = f"/v1/users/{quote(f'u{user}', safe='')}/{kind}"
        task = asyncio.create_task(_send(wire, path, json.dumps(body).encode(), begin + at, outcomes[kind]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    wire.close()
    return outcomes


async def _send(wire: Wire, path: str, body: bytes, due: float, outcome: Outcome) -> None:
    try:
        status, _ = await wire.post(path, body)
    except (OSError, asyncio.IncompleteReadError):
        status = 0
    outcome.seconds.append(time.perf_counter() - due)
    outcome.statuses[status] += 1


def report(outcomes: dict[str, Outcome]) -> list[str]:
    """Return one line a kind of request that was sent."""
    return [
        f"{kind:<10} {len(outcome.seconds):>7} requests  p50 {outcome.percentile(0.5):>8.2f} ms  "
        f"p99 {outcome.percentile(0.99):>8.2f} ms  max {outcome.percentile(1.0):>8.2f} ms  "
        + ", ".join(f"{status}: {count}" for status, count in sorted(outcome.statuses.items()))
        for kind, outcome in outcomes.items()
        if outcome.seconds
    ]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: %(default)s)")
    parser.add_argument("--token-variable", default="KSA_TOKEN", metavar="NAME", help="variable with the bearer token")
    parser.add_argument("--recommend", type=float, default=100.0, metavar="RATE", help="questions a second")
    parser.add_argument("--events", type=float, default=0.0, metavar="RATE", help="events a second")
    parser.add_argument("--events-per-call", type=int, default=1, metavar="N", help="events in one call")
    parser.add_argument("--users", type=int, default=1000, metavar="N", help="users u0 to uN-1")
    parser.add_argument("--items", type=int, default=1000, metavar="N", help="items i1 to iN")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; event ids begin with it")


def _run(args: argparse.Namespace) -> None:
    plan = Plan(
        recommend_rate=args.recommend or 1e-9,
        events_rate=args.events or 1e-9,
        events_per_call=args.events_per_call,
        users=args.users,
        items=args.items,
        seconds=args.seconds,
        seed=args.seed,
    )
    try:
        outcomes = asyncio.run(run_plan(args.url, os.environ.get(args.token_variable), plan))
    except OSError as error:
        raise UsageError(f"ksa load: {args.url}: expected a service, got: {error}.") from error
    print("\n".join(report(outcomes)))


verb = Verb(
    summary="send an even stream of questions and events, and tell the latencies",
    example="ksa load --url http://127.0.0.1:8000 --recommend 100 --events 1000 --seconds 30",
    configure=_configure,
    run=_run,
)
