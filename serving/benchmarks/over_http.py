"""A real service under an open loop: `python serving/benchmarks/over_http.py`, service and client on the same cores.

Users are drawn by Zipf's law, but for the row of one user with 100,000 events, whose states are in memory.
"""

import time

from live_service import LENGTHS, NUM_USERS, LiveService, live_service, parser
from reference import NUM_ITEMS, heading

from ksa_serving.load import Plan, report, run_load


def measure(service: LiveService, seconds: float) -> None:
    """Run each plan and print what it met."""
    seed = int(time.time())  # event ids begin with it: a directory used again knows the old ones
    longest = LENGTHS.index(max(LENGTHS))
    for title, plan in {
        "recommend 100/s": Plan(100, 0, 1, NUM_USERS, NUM_ITEMS, seconds, seed=seed),
        "events 1,000/s, one a call": Plan(0, 1000, 1, NUM_USERS, NUM_ITEMS, seconds, seed=seed + 1),
        "events 1,000/s, ten a call": Plan(0, 1000, 10, NUM_USERS, NUM_ITEMS, seconds, seed=seed + 2),
        "recommend 50/s beside events 100/s": Plan(50, 100, 1, NUM_USERS, NUM_ITEMS, seconds, seed=seed + 3),
        "recommend 10/s, one user of 100,000 events": Plan(10, 0, 1, 1, NUM_ITEMS, seconds, first_user=longest),
        "the same beside an event of theirs a second": Plan(
            10, 1, 1, 1, NUM_ITEMS, seconds, first_user=longest, seed=seed + 4
        ),
    }.items():
        spent, own = service.processor_seconds(), time.process_time()
        outcomes = run_load(service.url, None, plan)
        spent, own = service.processor_seconds() - spent, time.process_time() - own
        requests = sum(map(len, outcomes.values()))
        print(
            f"{title}: processor time a request: service {1000 * spent / requests:.2f} ms, "
            f"client {1000 * own / requests:.2f} ms"
        )
        print("  " + "\n  ".join(report(outcomes)), flush=True)
        time.sleep(2)


def main() -> None:
    """Start the service, measure."""
    args = parser(__doc__).parse_args()
    print(heading(), flush=True)
    with live_service(args) as service:
        measure(service, args.seconds)


if __name__ == "__main__":
    main()
