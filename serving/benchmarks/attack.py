"""One user against the others: `python serving/benchmarks/attack.py`, service, client and attacker on the same cores.

The attacker sends late events, anywhere in a history of 100,000, a thousand a call: 100 calls a second (100,000 events
a second), or, with --flood, as fast as four connections go. Meanwhile 50 questions a second come for 42 other users,
one of whom has 100,000 events too, in one run first without the attacker, then with; p99 of both are compared.
"""

import asyncio
import itertools
import multiprocessing
import random
import statistics
import time
from collections import Counter
from multiprocessing.queues import Queue

import msgspec
from live_service import LENGTHS, LiveService, live_service, parser
from reference import NUM_ITEMS, heading, history

from ksa_serving.load import Outcome, Plan, Wire, run_load

ATTACKER = max(user for user, length in enumerate(LENGTHS) if length == max(LENGTHS))
TURNS = 3
EVENTS_A_CALL = 1000
CALLS_A_SECOND = 100
CONNECTIONS = 4


def late_call(times: list[int], draw: random.Random) -> bytes:
    """Return a call of events that were never sent before, anywhere in the attacker's history."""
    items, at = draw.choices(range(1, NUM_ITEMS), k=EVENTS_A_CALL), draw.choices(times, k=EVENTS_A_CALL)
    return msgspec.json.encode(
        {"events": [{"item_id": f"i{item}", "timestamp": time} for item, time in zip(items, at)]}
    )


def attack(url: str, seconds: float, flood: bool, seed: int, met: "Queue[Counter[str]]") -> None:
    """Send late events for some seconds; tell how calls and events were answered. What was refused is sent again."""
    counts: Counter[str] = Counter()
    times, draw = [event.timestamp for event in history(max(LENGTHS), ATTACKER)], random.Random(seed)
    call = late_call(times, draw)

    async def send() -> None:
        wire = Wire(url, None)
        end = time.perf_counter() + seconds
        loop = asyncio.get_running_loop()

        async def send_one() -> None:
            nonlocal call
            answer: asyncio.Future[tuple[int, bytes]] = loop.create_future()
            wire.post(f"/v1/users/u{ATTACKER}/events", call, lambda *given: answer.set_result(given))
            status, body = await answer
            counts[f"calls {status}"] += 1
            if status == 200:
                call = late_call(times, draw)
                counts.update(result["status"] for result in msgspec.json.decode(body)["results"])

        async def send_without_end() -> None:
            while time.perf_counter() < end:
                await send_one()

        async with asyncio.TaskGroup() as group:
            if flood:
                for _ in range(CONNECTIONS):
                    group.create_task(send_without_end())
            while not flood and time.perf_counter() < end:
                group.create_task(send_one())
                await asyncio.sleep(1 / CALLS_A_SECOND)
        wire.close()

    asyncio.run(send())
    met.put(counts)


def questions(url: str, seconds: float) -> Outcome:
    """Return what the other users met."""
    return run_load(url, None, Plan(50, 0, 1, ATTACKER, NUM_ITEMS, seconds, seed=time.time_ns()))["recommend"]


def measure(service: LiveService, seconds: float, flood: bool) -> None:
    """Print what the others met without and with the attacker."""
    p99: dict[bool, list[float]] = {False: [], True: []}
    spawned = multiprocessing.get_context("spawn")
    for attacked, turn in itertools.product((False, True), range(TURNS)):
        met: Queue[Counter[str]] = spawned.Queue()
        process = spawned.Process(target=attack, args=(service.url, seconds + 1, flood, time.time_ns(), met))
        if attacked:
            process.start()
            time.sleep(1)
        spent = service.processor_seconds()
        outcome = questions(service.url, seconds)
        spent = (service.processor_seconds() - spent) / seconds
        p99[attacked].append(outcome.percentile(0.99))
        refused = len(outcome) - len(outcome.seconds[200])
        print(
            f"{turn}, {'with' if attacked else 'without'}: p50 {outcome.percentile(0.5):.1f}, "
            f"p99 {p99[attacked][-1]:.1f} ms, {refused} of {len(outcome)} refused, "
            f"{spent:.2f} processors used by the service",
            flush=True,
        )
        if attacked:
            print(f"   the attacker: {dict(met.get())}", flush=True)
            process.join()
    without, attacked = statistics.median(p99[False]), statistics.median(p99[True])
    print(
        f"p99, median of {TURNS}: {without:.1f} ms without, {attacked:.1f} with: {attacked / without - 1:+.0%} (asked: "
        f"10%); without the attacker the largest is {max(p99[False]) / min(p99[False]):.1f} times the smallest"
    )


def main() -> None:
    """Start the service, measure."""
    arguments = parser(__doc__)
    arguments.add_argument("--flood", action="store_true", help="send as fast as four connections go")
    args = arguments.parse_args()
    print(heading(), flush=True)
    with live_service(args) as service:
        measure(service, args.seconds, args.flood)


if __name__ == "__main__":
    main()
