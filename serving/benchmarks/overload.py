"""A real service beyond what it can do: `python serving/benchmarks/overload.py`, service and client on the same cores.

With `--through haproxy` the project's proxy stands before it, on the same cores too; with `--nice 5` proxy and client
give way to the service there, as where each had cores of its own.

An open loop of questions, then of events one a call. Capacity is found first: the rate is doubled until hardly more
a second are answered 200. Then .5 to 5 times as much is sent. Latencies are those of requests answered 200, from when
they were due.
"""

import argparse
import os
import time
from contextlib import nullcontext

from live_service import NUM_USERS, LiveService, behind_haproxy, live_service, parser
from reference import NUM_ITEMS, heading

from ksa_serving.load import Outcome, Plan, run_load

TIMES = (0.5, 0.8, 1, 2, 3, 5)
FIRST_RATES = {"recommend": 100, "events": 500}


def send(service: LiveService, kind: str, rate: float, seconds: float) -> tuple[float, Outcome]:
    """Return answers of 200 a second, and what was met."""
    rates = (rate, 0) if kind == "recommend" else (0, rate)
    seed = time.time_ns()  # event ids begin with it: a directory used again knows the old ones
    outcome = run_load(service.url, None, Plan(*rates, 1, NUM_USERS, NUM_ITEMS, seconds, seed=seed))[kind]
    time.sleep(2)
    return len(outcome.seconds[200]) / (seconds + outcome.percentile(1) / 1000), outcome


def find_capacity(service: LiveService, kind: str, rate: float, seconds: float) -> float:
    """Return the answers a second that asking for twice as many hardly raises."""
    most = 0.0
    while True:
        answered, _ = send(service, kind, rate, seconds)
        if answered < 1.1 * most:
            return max(most, answered)
        most, rate = answered, 2 * rate


def measure(service: LiveService, kind: str, first_rate: float, seconds: float) -> None:
    """Print what is met at each share of the capacity, and how far that is from what is asked."""
    capacity = find_capacity(service, kind, first_rate, seconds)
    print(f"{kind}: capacity {capacity:.0f}/s")
    goodput: dict[float, float] = {}
    p99: dict[float, float] = {}
    for times in TIMES:
        before = service.processor_seconds(), service.proxy_seconds(), time.process_time()
        goodput[times], outcome = send(service, kind, times * capacity, seconds)
        after = service.processor_seconds(), service.proxy_seconds(), time.process_time()
        spent, proxy, own = ((late - early) / seconds for early, late in zip(before, after))
        p99[times] = outcome.percentile(0.99)
        statuses = ", ".join(f"{status}: {len(met)}" for status, met in sorted(outcome.seconds.items()))
        print(
            f"  {times:>3} x: {times * capacity:>6.0f}/s sent, {goodput[times]:>6.0f}/s answered in "
            f"p50 {outcome.percentile(0.5):.1f}, p99 {p99[times]:.1f} ms; "
            f"refused in p50 {outcome.percentile(0.5, 503):.1f}, p99 {outcome.percentile(0.99, 503):.1f} ms; "
            f"{statuses}; "
            f"processors: service {spent:.2f}, proxy {proxy:.2f}, client {own:.2f}",
            flush=True,
        )
    print(
        f"  at 3 x: {goodput[3] / max(goodput.values()):.0%} of the most answered (asked: 90%), "
        f"p99 {p99[3] / p99[0.8]:.1f} times that at .8 (asked: 2)"
    )


def main() -> None:
    """Start the service, measure."""
    arguments = parser(__doc__)
    arguments.add_argument("--through", choices=["haproxy"], help="what stands before the service; nothing without it")
    arguments.add_argument("--kind", choices=list(FIRST_RATES), help="only one kind of requests")
    arguments.add_argument("--nice", type=int, default=0, help="how far the priority of proxy and client is lowered")
    args = arguments.parse_args()
    args.set = [*args.set, "user_events_per_second=0"]  # what the service can do is asked, not what one user may
    args.set.append("user_events_per_second=1e9")  # what is measured is the whole service's bound, not one user's
    print(heading(), flush=True)
    with live_service(args) as direct:
        os.nice(args.nice)  # of the client, and of what it starts from here on
        measure_all(args, direct)


def measure_all(args: argparse.Namespace, direct: LiveService) -> None:
    """Measure the kinds that were asked for, through what was asked for."""
    with behind_haproxy(direct) if args.through else nullcontext(direct) as service:
        for kind in [args.kind] if args.kind else FIRST_RATES:
            measure(service, kind, FIRST_RATES[kind], args.seconds)


if __name__ == "__main__":
    main()
