"""A real service under an open loop: `python serving/benchmarks/over_http.py`, service and client on the same cores.

200 users, two of them (1%) with 100,000 events, drawn by Zipf's law; IVF index over clustered items. A state directory
given by `--state-dir` is filled once and used again.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reference import NUM_ITEMS, heading, history, reference_run

from ksa_serving.client import Client
from ksa_serving.load import Plan, report, run_load
from ksa_serving.messages import EventMessage

LENGTHS = [100_000] * 2 + [10_000] * 2 + [1000] * 46 + [100] * 150
random.Random(7).shuffle(LENGTHS)


def fill(client: Client) -> None:
    """Keep all users' histories."""
    for user, length in enumerate(LENGTHS):
        events = [EventMessage(event.item_id, event.timestamp) for event in history(length, user)]
        for start in range(0, length, 1000):
            client.keep(f"u{user}", events[start : start + 1000])


def processor_seconds(pid: int) -> float:
    """Return what a process has used of the processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().split()
    return (int(fields[13]) + int(fields[14])) / 100


def measure(url: str, pid: int, seconds: float) -> None:
    """Run each plan and print what it met."""
    users = len(LENGTHS)
    seed = int(time.time())  # event ids begin with it: a directory used again knows the old ones
    for title, plan in {
        "recommend 100/s": Plan(100, 1e-9, 1, users, NUM_ITEMS, seconds, seed=seed),
        "events 1,000/s, one a call": Plan(1e-9, 1000, 1, users, NUM_ITEMS, seconds, seed=seed + 1),
        "events 1,000/s, ten a call": Plan(1e-9, 1000, 10, users, NUM_ITEMS, seconds, seed=seed + 2),
        "recommend 50/s beside events 100/s": Plan(50, 100, 1, users, NUM_ITEMS, seconds, seed=seed + 3),
    }.items():
        spent, own = processor_seconds(pid), time.process_time()
        outcomes = run_load(url, None, plan)
        service, client = processor_seconds(pid) - spent, time.process_time() - own
        requests = sum(len(outcome.seconds) for outcome in outcomes.values())
        print(
            f"{title}: processor time a request: service {1000 * service / requests:.2f} ms, "
            f"client {1000 * client / requests:.2f} ms"
        )
        print("  " + "\n  ".join(report(outcomes)), flush=True)
        time.sleep(2)


def main() -> None:
    """Start the service, fill it where it is empty, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-dir", type=Path, help="kept and used again; a temporary one without it")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each plan")
    parser.add_argument("--set", action="append", default=[], help="a setting of `ksa serve`")
    args = parser.parse_args()
    folder = args.state_dir or Path(tempfile.mkdtemp())
    command = [str(Path(sys.executable).parent / "ksa"), "serve", str(reference_run()), "--index", "ivf"]
    command += ["--port", "0", "--state-dir", str(folder), *(part for one in args.set for part in ("--set", one))]
    print(heading(), flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().split()[1]
    try:
        with Client(url, timeout=300) as client:
            if client.state("u0").num_events == 0:
                fill(client)
            began = time.perf_counter()
            while any(client.recommend(f"u{user}", k=1).degraded for user in range(len(LENGTHS))):
                time.sleep(1)
            print(f"all states ready: {time.perf_counter() - began:.0f} s", flush=True)
        measure(url, process.pid, args.seconds)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
        if args.state_dir is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
