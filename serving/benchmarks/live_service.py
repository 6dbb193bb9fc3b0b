"""A real service for benchmarks over HTTP, on the same cores as its client; by default the reference model by IVF.

200 users, two of them (1%) with 100,000 events. A state directory given by `--state-dir` is filled once and used again.
"""

import argparse
import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from reference import history, reference_run, with_lists

from ksa_serving.client import Client
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.shard_mover import MapFiles
from ksa_serving.shards import Process, first_map

LENGTHS = [100_000] * 2 + [10_000] * 2 + [1000] * 46 + [100] * 150
random.Random(7).shuffle(LENGTHS)
NUM_USERS = len(LENGTHS)
HAPROXY_CONFIG = Path(__file__).parents[1] / "haproxy.cfg"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the arguments that such benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--state-dir", type=Path, help="kept and used again; a temporary one without it")
    made.add_argument("--seconds", type=float, default=10.0, help="of each plan")
    made.add_argument("--index", default="ivf", help="of `ksa serve`; ivf needs faiss, exact does not")
    made.add_argument("--set", action="append", default=[], help="a setting of `ksa serve`")
    return made


@dataclass(frozen=True)
class LiveService:
    """A service that runs."""

    url: str
    admin: str
    process_id: int
    proxy_id: int | None = None

    def processor_seconds(self) -> float:
        """Return what the process has used of the processors."""
        return _processor_seconds(self.process_id)

    def proxy_seconds(self) -> float:
        """Return what the proxy before it has used of the processors; 0 where there is none."""
        return 0 if self.proxy_id is None else _processor_seconds(self.proxy_id)


@contextlib.contextmanager
def live_service(args: argparse.Namespace, run: Path | None = None) -> Iterator[LiveService]:
    """Start a service, fill it where it is empty, have all states computed; end it at last.

    Args:
        run: what is served; None: the reference run.
    """
    folder = args.state_dir or Path(tempfile.mkdtemp())
    run = run or reference_run()
    if args.index == "ivf":
        with_lists(run)
    options = ["--index", args.index, *(part for one in args.set for part in ("--set", one))]
    try:
        if not (folder / "events.sqlite").exists():
            _fill(folder)
        with started(run, folder, *options) as service:
            with Client(service.url, timeout=300) as client:
                began = time.perf_counter()
                while any(client.recommend(f"u{user}", k=1).degraded for user in range(NUM_USERS)):
                    time.sleep(1)
                print(f"all states ready: {time.perf_counter() - began:.0f} s", flush=True)
            yield service
    finally:
        if args.state_dir is None:
            shutil.rmtree(folder)


@contextlib.contextmanager
def started(run: Path, folder: Path, *options: str) -> Iterator[LiveService]:
    """Start a service of a run that keeps its state in a folder; end it at last."""
    command = [sys.executable, "-c", "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"]
    command += ["serve", str(run), "--releases", str(run.parent), "--admin-port", "0", "--port", "0"]
    process = subprocess.Popen([*command, "--state-dir", str(folder), *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline().split()
        yield LiveService(ready[1], ready[-1], process.pid)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def behind_haproxy(service: LiveService) -> Iterator[LiveService]:
    """Put HAProxy before a service: the project's configuration, with the files that `ksa shards` writes."""
    address = urlsplit(service.url).netloc
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        MapFiles(folder / "shards.json").tell_proxy(first_map({"shard-1": Process(address, address)}))
        (folder / "haproxy.cfg").write_text(HAPROXY_CONFIG.read_text().replace(":8000", f":{port}"))
        command = ["haproxy", "-db", "-f", str(folder / "haproxy.cfg"), "-f", str(folder / "shards.cfg")]
        with subprocess.Popen(command, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}) as proxy:
            time.sleep(1)
            try:
                yield replace(service, url=f"http://127.0.0.1:{port}", proxy_id=proxy.pid)
            finally:
                proxy.terminate()


def _processor_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().split()
    return (int(fields[13]) + int(fields[14])) / 100


def _fill(folder: Path) -> None:
    """Keep all users' histories, in order: past the service, which takes so many events of one user more slowly."""
    folder.mkdir(parents=True, exist_ok=True)
    log = EventLog(folder, "arrival")
    for user, length in enumerate(LENGTHS):
        events = [NewEvent(event.item_id, event.timestamp) for event in history(length, user)]
        for start in range(0, length, 1000):
            log.append(Owner(f"u{user}"), events[start : start + 1000])
    log.close()
