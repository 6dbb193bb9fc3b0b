"""The event log alone: `python serving/benchmarks/log_writing.py [--busy] [--switch 0.005]`.

Calls of one event, of 200 users: sent at 1,000 a second, and all at once. `--busy` has another thread of the process
compute in Python meanwhile, as a model's thread does; `--switch` is how long a thread may keep Python from the others.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

from reference import heading

from ksa_serving.command import SWITCH_SECONDS
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner

NUM_USERS = 200


def write(log: EventLog, name: str, count: int, rate: float | None) -> tuple[float, list[float]]:
    """Return events a second, and how long each took, sorted, in seconds."""
    taken: list[float] = []
    begin = time.perf_counter()
    futures = []
    for n in range(count):
        if rate is not None and n % 10 == 0:
            time.sleep(max(0.0, begin + n / rate - time.perf_counter()))
        since = time.perf_counter()
        future = log.submit(Owner(f"u{n * 7 % NUM_USERS}"), [NewEvent(f"i{n}", int(time.time()), f"{name}-{n}")])
        future.add_done_callback(lambda _, since=since: taken.append(time.perf_counter() - since))
        futures.append(future)
    for future in futures:
        future.result()
    return count / (time.perf_counter() - begin), sorted(taken)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="beside a busy thread")
    parser.add_argument("--switch", type=float, default=SWITCH_SECONDS, help="seconds (default: %(default)s)")
    parser.add_argument("--events", type=int, default=3000)
    args = parser.parse_args()
    sys.setswitchinterval(args.switch)
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(n * n for n in range(1000))

    print(heading())
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder), "arrival")
        other = threading.Thread(target=compute)
        if args.busy:
            other.start()
        rate, taken = write(log, "even", args.events, 1000.0)
        p50, p99 = (1000 * taken[int(share * (len(taken) - 1))] for share in (0.5, 0.99))
        print(f"sent at 1,000/s: {rate:,.0f} events/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms")
        print(f"all at once: {write(log, 'once', args.events, None)[0]:,.0f} events/s")
        done.set()
        if args.busy:
            other.join()
        log.close()


if __name__ == "__main__":
    main()
