"""Loading the libraries, `ksa prepare` and `ksa append-log`, one after the other in one process, each on its own.

    python pipelines/benchmarks/one_process.py LOG NEW_LOG DS

One line of JSON a step: its seconds, its processor seconds, and the process's peak of resident memory so far, in MiB.
"""

import argparse
import importlib
import json
import resource
import time
from collections.abc import Callable

from ksa_pipelines.commands.loading import loading
from recsys_ksa.cli import call_verb


def timed(what: str, step: Callable[[], None]) -> None:
    """Do a step and print what it took."""
    began, used = time.monotonic(), time.process_time()
    step()
    spent = {"seconds": time.monotonic() - began, "processor_seconds": time.process_time() - used}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    row = {"what": what} | {name: round(value, 2) for name, value in spent.items()} | {"peak_mib": peak}
    print(json.dumps(row), flush=True)


def load() -> None:
    """Import what the verbs work with."""
    with loading():
        for name in ("prepare", "append"):
            importlib.import_module(f"ksa_pipelines.{name}")


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("log", "new_log", "dataset"):
        parser.add_argument(name)
    args = parser.parse_args()
    timed("in one process: loading", load)
    timed("  prepare", lambda: call_verb("prepare", [args.log, "--out", args.dataset]))
    timed("  + 1% of few users", lambda: call_verb("append-log", [args.dataset, args.new_log]))


if __name__ == "__main__":
    main()
