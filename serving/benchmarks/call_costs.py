"""What a call of one event costs the service, in processor time: `python serving/benchmarks/call_costs.py`.

kept: acknowledged; the state follows in the background. refused: all room for writes is taken. The model is a toy
that takes next to no time. A process serves, another is the client; more calls a second are cheaper, for more of them
share a commit.
"""

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from reference import heading

from ksa_serving.app import create_app
from ksa_serving.command import SWITCH_SECONDS, listen
from ksa_serving.event_log import EventLog
from ksa_serving.load import Plan, run_load
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.server import ReadyServer, server_config
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import toy_release

STATUS = {"kept": 200, "refused": 503}


def serve(what: str, state_dir: Path, port: int) -> None:
    """Serve; without room for writes where they are to be refused."""
    sys.setswitchinterval(SWITCH_SECONDS)
    release, settings = toy_release(), ServeSettings()
    log, store = EventLog(state_dir, release.tie), MemoryStateStore(settings.state_bytes)
    service = Service(release, log, store, settings, models={release.state_fingerprint: release.model})
    while what == "refused" and service.rooms.writing.enter():
        pass
    server = ReadyServer(server_config(create_app(service), service), service, "ready")
    server.run(sockets=[listen("127.0.0.1", port)])


def listens(port: int) -> bool:
    """Return whether the service has started."""
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def processor_seconds(process_id: int) -> tuple[float, float]:
    """Return what a process has used of the processors, itself and in the kernel."""
    fields = Path(f"/proc/{process_id}/stat").read_text().split()
    ticks = os.sysconf("SC_CLK_TCK")
    return int(fields[13]) / ticks, int(fields[14]) / ticks


def measure(what: str, rate: float, seconds: float, port: int) -> None:
    """Send calls, tell what they took."""
    with tempfile.TemporaryDirectory() as name:
        service = multiprocessing.get_context("spawn").Process(target=serve, args=(what, Path(name), port), daemon=True)
        service.start()
        while not listens(port):
            time.sleep(0.5)
        for turn in range(3):
            before = processor_seconds(service.pid or 0)
            plan = Plan(0, rate, 1, 200, 1000, seconds, seed=turn)
            outcome = run_load(f"http://127.0.0.1:{port}", None, plan)["events"]
            after = processor_seconds(service.pid or 0)
            own, kernel = (1e6 * (late - early) / len(outcome) for late, early in zip(after, before))
            met = len(outcome.seconds[STATUS[what]])
            print(f"{met} of {len(outcome)} {what}: {own:.0f} us each, and {kernel:.0f} us in the kernel", flush=True)
        service.terminate()
        service.join()


def main() -> None:
    """Measure what was asked for."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", nargs="*", choices=[[], *STATUS], default=[], help="all without a name")
    made.add_argument("--kept-rate", type=float, default=1000, help="calls a second")
    made.add_argument("--refused-rate", type=float, default=6000, help="calls a second")
    made.add_argument("--seconds", type=float, default=3, help="of each of three turns")
    made.add_argument("--port", type=int, default=18997)
    args = made.parse_args()
    print(heading())
    for what in args.what or STATUS:
        measure(what, getattr(args, f"{what}_rate"), args.seconds, args.port)


if __name__ == "__main__":
    main()
