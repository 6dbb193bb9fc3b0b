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
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

from recsys_ksa.cli import Verb
from recsys_ksa.errors import UsageError

Answered = Callable[[int, bytes], None]
"""Told an answer's status and body; status 0 where the connection broke."""
CALL_EVENTS = 1000
"""Events in one call that sends a history."""
FIRST_TIME = 1_500_000_000
"""Of histories: 10^8 events later it is still past."""


@dataclass
class Outcome:
    """What one kind of request met: seconds to each answer, by its status; 0 is a broken connection."""

    seconds: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __len__(self) -> int:
        """Return how many were sent."""
        return sum(map(len, self.seconds.values()))

    def percentile(self, share: float, status: int = 200) -> float:
        """Return the latency, in milliseconds, that this share of the answers of one status stayed within."""
        ordered = sorted(self.seconds.get(status, []))
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Connection(asyncio.Protocol):
    """A kept connection that carries one request at a time, and goes back to `idle` when that is answered."""

    def __init__(self, idle: "list[Connection]"):
        self._idle = idle
        self._transport: Any = None
        self._answered: Answered | None = None
        self._read = b""

    def send(self, request: bytes, answered: Answered) -> None:
        """Send a request."""
        self._answered = answered
        self._transport.write(request)

    def close(self) -> None:
        """Close it."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._read += data
        head, end, body = self._read.partition(b"\r\n\r\n")
        if not end:
            return
        head = head.lower()
        if len(body) < int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]):
            return
        self._read = b""
        if b"\r\nconnection: close" in head:
            self._transport.close()
        else:
            self._idle.append(self)
        self._tell(int(head[9:12]), body)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self in self._idle:
            self._idle.remove(self)
        self._tell(0, b"")

    def _tell(self, status: int, body: bytes) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(status, body)


class Wire:
    """Kept connections to one service; as many as requests under way."""

    def __init__(self, url: str, token: str | None):
        from ksa_serving.client import authorization

        parts = urlsplit(url)
        try:
            self._host, self._port = parts.hostname or "", parts.port or 80
        except ValueError:  # of the port
            self._host = ""
        if parts.scheme != "http" or not self._host:
            raise UsageError(f"ksa load: --url: expected http://HOST:PORT, got {url!r}.")
        headers = {"host": parts.netloc, **authorization(token), "content-type": "application/json"}
        self._head = " HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()

    def post(self, path: str, body: bytes, answered: Answered) -> None:
        """Send a request at once, over a new connection where all are taken."""
        request = f"POST {path}{self._head}content-length: {len(body)}\r\n\r\n".encode() + body
        if self._idle:
            self._idle.pop().send(request, answered)
            return
        task = asyncio.get_running_loop().create_task(self._post_anew(request, answered))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def open(self) -> None:
        """Open a connection more.

        Raises:
            OSError: nobody listens.
        """
        connect = asyncio.get_running_loop().create_connection
        _, connection = await connect(lambda: Connection(self._idle), self._host, self._port)
        self._idle.append(connection)

    async def _post_anew(self, request: bytes, answered: Answered) -> None:
        try:
            await self.open()
        except OSError:
            answered(0, b"")
        else:
            self._idle.pop().send(request, answered)

    def close(self) -> None:
        """Close the connections, none of which is under way."""
        for connection in self._idle:
            connection.close()


@dataclass(frozen=True)
class Plan:
    """What to send. Rates a second; `items` ids i1..iN; `users` ids from u`first_user` on, drawn by Zipf's law."""

    recommend_rate: float
    events_rate: float
    events_per_call: int
    users: int
    items: int
    seconds: float
    zipf: float = 1.0
    k: int = 10
    seed: int = 0
    first_user: int = 0


async def run_plan(url: str, token: str | None, plan: Plan) -> dict[str, Outcome]:
    """Send a plan's requests when they are due; return what each kind met.

    Raises:
        OSError: nobody listens there.
    """
    wire = Wire(url, token)
    await wire.open()
    outcomes = {"recommend": Outcome(), "events": Outcome()}
    due = [(n / plan.recommend_rate, "recommend") for n in range(int(plan.seconds * plan.recommend_rate))]
    calls = plan.events_rate / plan.events_per_call
    due += [(n / calls + 1e-4, "events") for n in range(int(plan.seconds * calls))]
    answered_all = asyncio.Event()
    under_way = len(due)
    requests = _requests(plan, sorted(due))
    begin = time.perf_counter()

    def answered(kind: str, at: float, status: int, _: bytes) -> None:
        nonlocal under_way
        outcomes[kind].seconds[status].append(time.perf_counter() - begin - at)
        under_way -= 1
        if not under_way:
            answered_all.set()

    for at, kind, path, body in requests:
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))  # also where it is late: answers are read
        wire.post(path, body, partial(answered, kind, at))
    if due:
        await answered_all.wait()
    wire.close()
    return outcomes


def send_histories(url: str, token: str | None, plan: Plan, num_events: int) -> None:
    """Have every hundredth user begin with so many events, a second apart; sent again, they are known.

    Raises:
        ClientError: the service refused, or could not be reached.
    """
    from tqdm import tqdm

    from ksa_serving.client import Client
    from ksa_serving.messages import EventMessage

    users = range(plan.first_user, plan.first_user + plan.users, 100)
    draw = random.Random(plan.seed)
    with Client(url, token) as client, tqdm(total=len(users) * num_events, unit=" events") as bar:
        for user in users:
            for start in range(0, num_events, CALL_EVENTS):
                numbers = range(start, min(start + CALL_EVENTS, num_events))
                items = draw.choices(range(1, plan.items + 1), k=len(numbers))
                client.keep(
                    f"u{user}",
                    [EventMessage(f"i{item}", FIRST_TIME + n, f"h{n:09}") for item, n in zip(items, numbers)],
                )
                bar.update(len(numbers))


def run_load(url: str, token: str | None, plan: Plan) -> dict[str, Outcome]:
    """Do what `run_plan` does, on the quicker event loop.

    Raises:
        OSError: nobody listens there.
    """
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_plan(url, token, plan))


def _requests(plan: Plan, due: Sequence[tuple[float, str]]) -> list[tuple[float, str, str, bytes]]:
    """Return when each request is due, its kind, path and body; made before the first is sent, to cost nothing then."""
    draw = random.Random(plan.seed)
    weights = list(accumulate(1 / (rank + 1) ** plan.zipf for rank in range(plan.users)))
    users = draw.choices(range(plan.first_user, plan.first_user + plan.users), cum_weights=weights, k=len(due))
    now = time.time()
    question = json.dumps({"k": plan.k}).encode()
    return [
        (
            at,
            kind,
            f"/v1/users/u{user}/{kind}",
            _events(plan, draw, number, int(now + at)) if kind == "events" else question,
        )
        for number, ((at, kind), user) in enumerate(zip(due, users))
    ]


def _events(plan: Plan, draw: random.Random, number: int, timestamp: int) -> bytes:
    """Return the body of call `number`."""
    events = [
        {
            "item_id": f"i{draw.randint(1, plan.items)}",
            "timestamp": timestamp,
            "event_id": f"{plan.seed}-{number:09}-{n}",
        }
        for n in range(plan.events_per_call)
    ]
    return json.dumps({"events": events}).encode()


def report(outcomes: dict[str, Outcome]) -> list[str]:
    """Return one line a kind of request that was sent: latencies of those answered 200, and how many were not."""
    return [
        f"{kind:<10} {len(outcome):>7} requests  p50 {outcome.percentile(0.5):>8.2f} ms  "
        f"p99 {outcome.percentile(0.99):>8.2f} ms  max {outcome.percentile(1.0):>8.2f} ms  "
        + ", ".join(f"{status}: {len(seconds)}" for status, seconds in sorted(outcome.seconds.items()))
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
    parser.add_argument(
        "--long-history", type=int, default=0, metavar="N", help="events that every hundredth user is given first"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; event ids begin with it")


def _run(args: argparse.Namespace) -> None:
    least = {"long_history": 0, "users": 1, "items": 1, "events_per_call": 1, "seconds": 0, "recommend": 0, "events": 0}
    for name, low in least.items():
        if not low <= getattr(args, name) < float("inf"):
            flag = name.replace("_", "-")
            raise UsageError(f"ksa load: --{flag}: expected {low} or more, got {getattr(args, name)}.")
    plan = Plan(
        recommend_rate=args.recommend,
        events_rate=args.events,
        events_per_call=args.events_per_call,
        users=args.users,
        items=args.items,
        seconds=args.seconds,
        seed=args.seed,
    )
    token = os.environ.get(args.token_variable)
    if args.long_history:
        send_histories(args.url, token, plan, args.long_history)
    try:
        outcomes = run_load(args.url, token, plan)
    except OSError as error:
        raise UsageError(f"ksa load: {args.url}: expected a service, got: {error}.") from error
    print("\n".join(report(outcomes)))


verb = Verb(
    summary="send an even stream of questions and events, and tell the latencies",
    example="ksa load --url http://127.0.0.1:8000 --recommend 100 --events 1000 --long-history 100000 --seconds 30",
    configure=_configure,
    run=_run,
)
