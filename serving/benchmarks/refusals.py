"""What a refusal costs: `python serving/benchmarks/refusals.py`, a service whose room for writes is taken for good.

The model is a toy: none of it runs. Processor time of the service for each call of one event that it refuses.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

from reference import heading

from ksa_serving.app import create_app
from ksa_serving.command import listen
from ksa_serving.event_log import EventLog
from ksa_serving.load import Plan, run_load
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.server import ReadyServer, server_config
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import toy_release


def serve(state_dir: Path, port: int) -> None:
    """Serve without room for writes."""
    release, settings = toy_release(), ServeSettings()
    log, store = EventLog(state_dir, release.tie), MemoryStateStore(settings.state_bytes)
    service = Service(release, log, store, settings, models={release.state_fingerprint: release.model})
    while service.rooms.writing.enter():
        pass
    server = ReadyServer(server_config(create_app(service), service), service, "ready")
    server.run(sockets=[listen("127.0.0.1", port)])


def processor_seconds(process_id: int) -> tuple[float, float]:
    """Return what a process has used of the processors, itself and in the kernel."""
    fields = Path(f"/proc/{process_id}/stat").read_text().split()
    ticks = os.sysconf("SC_CLK_TCK")
    return int(fields[13]) / ticks, int(fields[14]) / ticks


def main() -> None:
    """Send calls, tell what refusing them took."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rate", type=float, default=6000, help="calls a second")
    made.add_argument("--seconds", type=float, default=3, help="of each of three turns")
    made.add_argument("--port", type=int, default=18997)
    args = made.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory() as name:
        service = multiprocessing.get_context("spawn").Process(target=serve, args=(Path(name), args.port))
        service.start()
        time.sleep(5)  # it starts
        for turn in range(3):
            before = processor_seconds(service.pid or 0)
            plan = Plan(0, args.rate, 1, 200, 1000, args.seconds, seed=turn)
            refused = run_load(f"http://127.0.0.1:{args.port}", None, plan)["events"].seconds[503]
            after = processor_seconds(service.pid or 0)
            own, kernel = (1e6 * (late - early) / len(refused) for late, early in zip(after, before))
            print(f"{len(refused)} refused: {own:.0f} us each, and {kernel:.0f} us in the kernel")
        service.terminate()
        service.join()


if __name__ == "__main__":
    main()
