"""A service on a GPU under an open loop: `python serving/benchmarks/on_gpu.py`, client and service on one machine.

8 layers, 256 wide, a million items searched exactly; 200 users of 100 to 100,000 events drawn by Zipf's law, their
states in pages on the GPU. Questions at rising rates, then beside events. Latency counts from when a request was due.
`--processes 4`: that many services of the one GPU, each with its share of the users, behind HAProxy.
"""

import time

from live_service import NUM_USERS, LiveService, live_service, parser
from reference import NUM_LARGE_ITEMS, heading, large_run

from ksa_serving.load import Plan, report, run_load


def measure(service: LiveService, recommend_rate: float, events_rate: float, seconds: float) -> None:
    """Run one plan and print what it met."""
    plan = Plan(recommend_rate, events_rate, 1, NUM_USERS, NUM_LARGE_ITEMS, seconds, seed=time.time_ns())
    before = service.processor_seconds(), service.proxy_seconds(), time.process_time()
    outcomes = run_load(service.url, None, plan)
    after = service.processor_seconds(), service.proxy_seconds(), time.process_time()
    spent, proxy, own = ((then - now) / seconds for now, then in zip(before, after))
    print(
        f"recommend {recommend_rate:.0f}/s, events {events_rate:.0f}/s: processors: service {spent:.2f}, "
        f"proxy {proxy:.2f}, client {own:.2f}\n  " + "\n  ".join(report(outcomes)),
        flush=True,
    )
    time.sleep(2)


def main() -> None:
    """Start the service, measure."""
    made = parser(__doc__)
    made.add_argument("--rates", type=float, nargs="+", default=[200, 500, 1000, 1500, 2000], help="questions a second")
    made.add_argument("--beside", type=float, default=200, help="events a second beside the questions, one a call")
    made.add_argument("--processes", type=int, default=1, help="services, beyond one behind HAProxy")
    args = made.parse_args()
    args.set, args.index = ["device=cuda", *args.set], "exact"
    print(f"{heading('cuda')}, {args.processes} processes", flush=True)
    with live_service(args, large_run(), args.processes) as service:
        for events_rate in (0, args.beside):
            for rate in args.rates:
                measure(service, rate, events_rate, args.seconds)


if __name__ == "__main__":
    main()
