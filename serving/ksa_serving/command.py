"""The verb `ksa serve`: one process, one run, one state directory."""

import argparse
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from recsys_ksa.cli import Verb
from recsys_ksa.errors import UsageError

if TYPE_CHECKING:
    from ksa_serving.settings import ServeSettings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run or bundle")
    parser.add_argument("--port", type=int, required=True, metavar="P", help="TCP port; 0 takes a free one")
    parser.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="where events are kept")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--insecure-no-auth",
        action="store_true",
        help="listen beyond loopback although nobody has to say who they are",
    )


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; print one line when ready."""
    check_host(args.host, args.insecure_no_auth)
    # Before torch loads its threads' runtime: beside another busy process, spinning threads were 15-20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    listener = listen(args.host, args.port)
    try:
        serve(args.run, args.state_dir, args.host, listener)
    finally:
        listener.close()


verb = Verb(
    summary="Keep users' events and answer what comes next, over HTTP",
    example="ksa serve runs/demo --port 8000 --state-dir state/",
    configure=configure,
    run=run,
)


def check_host(host: str, insecure_no_auth: bool) -> None:
    """Refuse to listen beyond loopback: there is no authentication.

    Raises:
        UsageError: the flag that accepts it is missing.
    """
    if host not in LOOPBACK and not insecure_no_auth:
        raise UsageError(
            f"ksa serve: --host {host} would let anyone who reaches it read and write users' events, for there is no "
            "authentication. Leave --host out, or put a proxy before it, or add --insecure-no-auth."
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UsageError: the address or port cannot be had.
    """
    choose = f"ksa serve: expected to listen on {host} port {port}, got: {{}}. Choose another."
    if not 0 <= port < 2**16:
        raise UsageError(choose.format("no port; ports are 0 to 65535"))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UsageError(choose.format(error)) from error


def prepare_state_dir(path: Path) -> Path:
    """Return the state directory, made if it is new, readable by its owner alone.

    Raises:
        UsageError: it is a link, no directory, or someone else's.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise UsageError(f"ksa serve: --state-dir {path}: expected a directory, got: {error.strerror}.") from error
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"ksa serve: --state-dir {path}: expected a directory, got a link or file. Name it directly.")
    if found.st_uid != os.getuid():
        raise UsageError(f"ksa serve: --state-dir {path}: expected a directory of this user, got another user's.")
    path.chmod(0o700)
    return path


def serve(
    run: Path, state_dir: Path, host: str, listener: socket.socket, settings: "ServeSettings | None" = None
) -> None:
    """Load the run, open the event log, serve until told to stop. States are rebuilt when first asked for."""
    from ksa_serving.app import create_app
    from ksa_serving.event_log import EventLog
    from ksa_serving.release import load_release
    from ksa_serving.server import ReadyServer, server_config
    from ksa_serving.service import Service
    from ksa_serving.settings import ServeSettings
    from ksa_serving.state_store import MemoryStateStore

    settings = settings or ServeSettings()
    # Also before torch: several model threads share the cores, so each gets its part of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // settings.model_threads)))
    release = load_release(run)
    log = EventLog(
        prepare_state_dir(state_dir),
        release.tie,
        group_events=settings.group_events,
        waiting_calls=settings.waiting_calls,
    )
    try:
        num_users, num_events = log.counts()
        service = Service(release, log, MemoryStateStore(settings.state_bytes), settings)
        name = f"[{host}]" if ":" in host else host
        ready = (
            f"ready: http://{name}:{listener.getsockname()[1]}  model {release.model_version[:12]}  "
            f"index: {release.index_source}  events kept: {num_events} of {num_users} users"
        )
        server = ReadyServer(server_config(create_app(service, host), settings), service, ready)
        server.run(sockets=[listener])
    finally:
        log.close()
