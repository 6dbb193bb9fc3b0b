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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from reference import history, reference_run, with_lists

from ksa_serving.client import Client
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.shard_mover import MapFiles
from ksa_serving.shards import Process, first_map, virtual_shard

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
    process_ids: tuple[int, ...]
    proxy_id: int | None = None

    def processor_seconds(self) -> float:
        """Return what its processes have used of the processors."""
        return sum(map(_processor_seconds, self.process_ids))

    def proxy_seconds(self) -> float:
        """Return what the proxy before it has used of the processors; 0 where there is none."""
        return 0 if self.proxy_id is None else _processor_seconds(self.proxy_id)


@contextlib.contextmanager
def live_service(args: argparse.Namespace, run: Path | None = None, num_processes: int = 1) -> Iterator[LiveService]:
    """Start a service, fill it where it is empty, have all states computed; end it at last.

    Args:
        run: what is served; None: the reference run.
        num_processes: beyond one they are behind HAProxy, each with its share of the users.
    """
    root = args.state_dir or Path(tempfile.mkdtemp())
    run = run or reference_run()
    if args.index == "ivf":
        with_lists(run)
    options = ["--index", args.index, *(part for one in args.set for part in ("--set", one))]
    names = [f"shard-{number}" for number in range(1, num_processes + 1)]
    owners = first_map({name: Process("", "") for name in names}).owners
    folders = {name: root / name if num_processes > 1 else root for name in names}
    try:
        for name, folder in folders.items():
            if not (folder / "events.sqlite").exists():
                _fill(folder, [user for user in range(NUM_USERS) if owners[virtual_shard(f"u{user}")] == name])
        with contextlib.ExitStack() as stack:
            services = stack.enter_context(started_together(run, list(folders.values()), *options))
            proxied = behind_haproxy(*services) if num_processes > 1 else contextlib.nullcontext(services[0])
            service = stack.enter_context(proxied)
            with Client(service.url, timeout=300) as client:
                began = time.perf_counter()
                while any(client.recommend(f"u{user}", k=1).degraded for user in range(NUM_USERS)):
                    time.sleep(1)
                print(f"all states ready: {time.perf_counter() - began:.0f} s", flush=True)
            yield service
    finally:
        if args.state_dir is None:
            shutil.rmtree(root)


@contextlib.contextmanager
def started(run: Path, folder: Path, *options: str) -> Iterator[LiveService]:
    """Start a service of a run that keeps its state in a folder; end it at last."""
    with started_together(run, [folder], *options) as (service,):
        yield service


@contextlib.contextmanager
def started_together(run: Path, folders: Sequence[Path], *options: str) -> Iterator[list[LiveService]]:
    """Start a service of a run for each folder that keeps its state; end them at last."""
    command = [sys.executable, "-c", "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"]
    command += ["serve", str(run), "--releases", str(run.parent), "--admin-port", "0", "--port", "0", *options]
    processes = [
        subprocess.Popen([*command, "--state-dir", str(folder)], stdout=subprocess.PIPE, text=True)
        for folder in folders
    ]
    try:
        yield [_when_ready(process) for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate()


def _when_ready(process: "subprocess.Popen[str]") -> LiveService:
    assert process.stdout is not None
    ready = process.stdout.readline().split()
    return LiveService(ready[1], ready[-1], (process.pid,))


@contextlib.contextmanager
def behind_haproxy(*services: LiveService) -> Iterator[LiveService]:
    """Put HAProxy before services, which share the users: the project's configuration, with files of `ksa shards`."""
    addresses = [urlsplit(service.url).netloc for service in services]
    processes = {f"shard-{number}": Process(address, address) for number, address in enumerate(addresses, start=1)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        MapFiles(folder / "shards.json").tell_proxy(first_map(processes))
        (folder / "haproxy.cfg").write_text(HAPROXY_CONFIG.read_text().replace(":8000", f":{port}"))
        command = ["haproxy", "-db", "-f", str(folder / "haproxy.cfg"), "-f", str(folder / "shards.cfg")]
        with subprocess.Popen(command, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}) as proxy:
            time.sleep(1)
            process_ids = tuple(one for service in services for one in service.process_ids)
            try:
                yield LiveService(f"http://127.0.0.1:{port}", services[0].admin, process_ids, proxy.pid)
            finally:
                proxy.terminate()


def _processor_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().split()
    return (int(fields[13]) + int(fields[14])) / 100


def _fill(folder: Path, users: Sequence[int]) -> None:
    """Keep users' histories, in order: past the service, which takes so many events of one user more slowly."""
    folder.mkdir(parents=True, exist_ok=True)
    log = EventLog(folder, "arrival")
    for user in users:
        length = LENGTHS[user]
        events = [NewEvent(event.item_id, event.timestamp) for event in history(length, user)]
        for start in range(0, length, 1000):
            log.append(Owner(f"u{user}"), events[start : start + 1000])
    log.close()
