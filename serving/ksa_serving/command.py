"""The verb `ksa serve`: one process, one run, one state directory."""

import argparse
import gc
import os
import resource
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recsys_ksa.cli import Verb
from recsys_ksa.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ksa_serving.event_log import EventLog
    from ksa_serving.models import Model
    from ksa_serving.settings import ServeSettings
    from ksa_serving.state_store import StateStore

SWITCH_SECONDS = 0.0001
"""How long a thread may keep Python from the others. The log's writer asks for it back some times an event, an answer
dozens of times: with Python's 5 ms 125 events a second were written beside one busy thread, with 0.5 ms 988 (2 cores).
"""
GARBAGE_OBJECTS = 20_000
"""Objects made and kept before Python looks for garbage among them. At its 700 it looked ten times a second under load,
and every few seconds through all states, which stopped all requests for 10 to 60 ms."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run or bundle")
    parser.add_argument("--port", type=int, required=True, metavar="P", help="TCP port; 0 takes a free one")
    parser.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="where events are kept")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="TOML file of bearer tokens and their scopes")
    parser.add_argument(
        "--store",
        default="lmdb",
        metavar="lmdb|memory|URL",
        help="where long users' summaries are kept: a file in DIR, nowhere, or redis://HOST:PORT/DB "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--index",
        choices=["exact", "ivf"],
        default="exact",
        help="how items are searched; ivf is approximate, for large catalogues, by the lists that `ksa index --kind "
        "ivf` has made of this run and of those in --releases (default: %(default)s)",
    )
    parser.add_argument("--releases", type=Path, metavar="DIR", help="folder of further runs that may be activated")
    parser.add_argument("--admin-port", type=int, metavar="P", help="loopback port for releases; 0 takes a free one")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings (settings.py lists them)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting, as state_bytes=1000000 or limits.k=50",
    )
    parser.add_argument(
        "--insecure-no-auth",
        action="store_true",
        help="listen beyond loopback although nobody has to say who they are",
    )


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; print one line when ready."""
    check_host(args.host, args.insecure_no_auth or args.tokens is not None)
    if args.releases is not None and (args.admin_port is None or not args.releases.is_dir()):
        raise UsageError(f"ksa serve: --releases {args.releases}: expected a directory, and --admin-port beside it.")
    # Before torch loads its threads' runtime: beside another busy process, spinning threads were 15-20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    listeners = [listen(args.host, args.port)]
    try:
        if args.admin_port is not None:
            listeners.append(listen("127.0.0.1", args.admin_port))
        serve(args, listeners)
    finally:
        for listener in listeners:
            listener.close()


verb = Verb(
    summary="keep users' events and answer what comes next, over HTTP",
    example="ksa serve runs/demo --port 8000 --state-dir state/",
    configure=configure,
    run=run,
)


def check_host(host: str, insecure_no_auth: bool) -> None:
    """Refuse to listen beyond loopback where nobody has to say who they are.

    Raises:
        UsageError: the flag that accepts it is missing.
    """
    if host not in LOOPBACK and not insecure_no_auth:
        raise UsageError(
            f"ksa serve: --host {host} would let anyone who reaches it read and write users' events. Name a file of "
            "tokens with --tokens, or leave --host out, or add --insecure-no-auth."
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
    from ksa_serving.durable import make_folders

    try:
        make_folders(path)
        found = path.lstat()
    except OSError as error:
        raise UsageError(f"ksa serve: --state-dir {path}: expected a directory, got: {error.strerror}.") from error
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"ksa serve: --state-dir {path}: expected a directory, got a link or file. Name it directly.")
    if found.st_uid != os.getuid():
        raise UsageError(f"ksa serve: --state-dir {path}: expected a directory of this user, got another user's.")
    path.chmod(0o700)
    return path


def open_store(
    kind: str, state_dir: Path, models: "Mapping[str, Model]", log: "EventLog", settings: "ServeSettings"
) -> "StateStore":
    """Return the store that `--store` names; its next `purge` removes what a crash left of deleted users.

    Raises:
        UsageError: it cannot be opened.
    """
    from ksa_serving.cold_store import ColdStateStore, EngineError
    from ksa_serving.memory_store import MemoryStateStore
    from ksa_serving.tiered_store import TieredStateStore

    if kind == "memory":
        return MemoryStateStore(settings.state_bytes, settings.largest_share)
    largest = None
    try:
        if kind == "lmdb":
            from ksa_serving.lmdb_engine import LmdbEngine

            engine = LmdbEngine(state_dir, settings.cold_bytes)
            largest = int(settings.largest_share * settings.cold_bytes)
        elif kind.startswith(("redis://", "rediss://", "unix://")):
            from ksa_serving.redis_engine import RedisEngine

            engine = RedisEngine(kind)
        else:
            raise UsageError(f"--store: expected lmdb, memory or redis://HOST:PORT/DB, got {kind!r}.")
    except (EngineError, ValueError) as error:
        raise UsageError(f"--store {kind}: cannot be opened: {error}.") from error
    cold = ColdStateStore(engine, models, log.salt, largest)
    cold.owe(log.deleted())

    def worth_keeping(num_events: int) -> bool:
        return any(model.replay_start(num_events) > 0 for model in models.values())

    return TieredStateStore(settings.state_bytes, cold, worth_keeping, settings.spill_events, settings.largest_share)


def serve(args: argparse.Namespace, listeners: list[socket.socket]) -> None:
    """Load the run, open the event log, serve until told to stop. States are rebuilt when first asked for."""
    from ksa_serving.app import create_app
    from ksa_serving.auth import Tokens
    from ksa_serving.event_log import EventLog
    from ksa_serving.release import Release, load_release
    from ksa_serving.server import ReadyServer, server_config
    from ksa_serving.service import Service
    from ksa_serving.settings import ServeSettings
    from recsys_ksa.config import load_config

    sys.setswitchinterval(SWITCH_SECONDS)
    settings = load_config(ServeSettings, args.config, args.set)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (most, most)
    )  # each connection is a file; often 1,024 are allowed at first
    tokens = None if args.tokens is None else Tokens(args.tokens)
    # Also before torch: two passes at once are the rule, so each gets its half of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))

    def load(run: Path) -> Release:
        return load_release(run, args.index, settings.cold_parity, settings.device, settings.pool_bytes)

    release = load(args.run)
    gc.collect()
    gc.freeze()  # what is loaded stays: looking through it for garbage stopped all requests for a third of a second
    gc.set_threshold(GARBAGE_OBJECTS)
    state_dir = prepare_state_dir(args.state_dir)
    log = EventLog(
        state_dir,
        release.tie,
        group_events=settings.group_events,
        waiting_calls=settings.waiting_calls,
        late_horizon=settings.inline_events,
        user_events=settings.limits.user_events,
    )
    try:
        models: dict[str, Model] = {release.state_fingerprint: release.model}
        store = open_store(args.store, state_dir, models, log, settings)
        num_users, num_events = log.counts()
        service = Service(release, log, store, settings, models=models, releases=args.releases, load=load)
        ports = [listener.getsockname()[1] for listener in listeners]
        name = f"[{args.host}]" if ":" in args.host else args.host
        ready = (
            f"ready: http://{name}:{ports[0]}  model {release.model_version[:12]}  "
            f"index: {release.index_source}  events kept: {num_events} of {num_users} users"
        )
        if ports[1:]:
            ready += f"  admin: http://127.0.0.1:{ports[1]}"
        app = create_app(service, args.host, tokens, ports[1] if ports[1:] else None)
        server = ReadyServer(server_config(app, service), service, ready)
        server.run(sockets=listeners)
    finally:
        log.close()
