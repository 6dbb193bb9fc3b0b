"""`ksa replay`: rebuild every state from a copy of the event log, and compare what the cold store leads to.

The service may run on: its log and its cold store's file are copied as of one instant each, and nothing in its
directory is written. What is rebuilt, with a digest of each state, is a state directory of its own, put in place whole.
"""

import argparse
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from recsys_ksa.cli import Verb
from recsys_ksa.errors import UsageError
from recsys_ksa.progress import progress

if TYPE_CHECKING:
    from ksa_serving.event_log import EventLog
    from ksa_serving.release import Release
    from ksa_serving.settings import ServeSettings
    from ksa_serving.state_store import StateStore

DIGESTS = "digests.txt"
"""One line a user: who it is, as a salted hash; events; the history's rolling hash; SHA-256 of the state's bytes."""
Kind = Literal["log", "history", "rows"]
"""What differs: the log from its own hashes; a stored state's events, order or own items; its rows, beyond rounding."""
MOST_TOLD = 20
"""Users told of by their hashes."""


@dataclass(frozen=True)
class Replayed:
    """One user: the salted hash, the line of `DIGESTS`, and how a stored state compares (None: none was stored)."""

    key: str
    digest: str
    difference: float | None
    kind: Kind | None


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run that is served")
    parser.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="of a service, running or stopped")
    parser.add_argument("--out", type=Path, metavar="NEW", help="keep what is rebuilt; must not exist")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, as given to `ksa serve`"
    )
    parser.add_argument("--store", default="lmdb", metavar="lmdb|URL", help="as given to `ksa serve`")


def _run(args: argparse.Namespace) -> None:
    if not (args.state_dir / "events.sqlite").is_file():
        raise UsageError(f"--state-dir: expected a service's directory, found none at {args.state_dir}.")
    if args.out is not None and args.out.exists():
        raise UsageError(f"--out: expected a new directory, got {args.out}, which exists.")
    from ksa_serving.command import open_store
    from ksa_serving.event_log import EventLog
    from ksa_serving.release import load_release
    from ksa_serving.settings import ServeSettings
    from recsys_ksa.config import load_config

    settings = load_config(ServeSettings, None, args.set)
    release = load_release(args.run, cold_parity=settings.cold_parity)
    beside = None if args.out is None else args.out.absolute().parent
    with TemporaryDirectory(prefix=".replay-", dir=beside) as name:
        new, old = Path(name, "new"), Path(name, "old")
        for folder in (new, old):
            folder.mkdir(mode=0o700)
        copy_log(args.state_dir, new)
        copy_states(args.state_dir, old)
        log = EventLog(new, release.tie)
        stored = open_store(args.store, old, {release.state_fingerprint: release.model}, log, settings)
        kinds: Counter[Kind] = Counter()
        found, worst = 0, 0.0
        try:
            log.check_file()
            with (new / DIGESTS).open("w") as digests:
                for user in replay(release, log, stored, new, settings):
                    digests.write(f"{user.key} {user.digest}\n")
                    if user.difference is not None:
                        found, worst = found + 1, max(worst, user.difference)
                    if user.kind is not None:
                        kinds[user.kind] += 1
                        if kinds.total() <= MOST_TOLD:
                            print(f"different: {user.kind} of user {user.key}")
            users, events = log.counts()
        finally:
            stored.close()
            log.close()
        if args.out is not None:
            new.rename(args.out)
    print(f"{events} events of {users} users; {found} states stored, largest difference {worst:.1e}")
    if kinds:
        told = ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))
        print(f"{kinds.total()} users differ from their log by more than rounding ({told}).")
        if kinds["log"] < kinds.total():
            print("Remove the cold store: it is rebuilt from the log.")
        raise SystemExit(1)


def replay(
    release: "Release", log: "EventLog", stored: "StateStore", folder: Path, settings: "ServeSettings"
) -> Iterator[Replayed]:
    """Rebuild every user's state into a cold store in `folder`, and compare; one user is in memory at a time.

    Args:
        stored: what is compared; read, never written.
    """
    from ksa_serving.cold_store import ColdStateStore
    from ksa_serving.errors import EventLogError
    from ksa_serving.lmdb_engine import LmdbEngine
    from ksa_serving.memory_store import MemoryStateStore
    from ksa_serving.user_states import UserStates

    model = release.model
    engine = LmdbEngine(folder, settings.cold_bytes)
    rebuilt = ColdStateStore(engine, {release.state_fingerprint: model}, log.salt)
    tolerance = {"exact": settings.audit_tolerance, "int8": settings.audit_tolerance_int8}
    one = MemoryStateStore(settings.state_bytes)
    states = UserStates(release, log, one, settings.rebuild_step_events)
    try:
        for owner in progress(log.owners(), "replaying", unit=" users"):
            key = owner.key(log.salt).hex()
            try:
                with log.view(owner) as view:
                    view.check()
            except EventLogError:
                yield Replayed(key, "damaged", None, "log")
                continue
            fresh = states.current(owner)[0]
            rebuilt.put(fresh)
            one.drop(owner)
            difference, kind = None, None
            record = stored.get(owner, release.state_fingerprint)
            if record is not None:
                one.put(record)
                state = states.current(owner)[0].state  # what an answer would come from
                one.drop(owner)
                difference = model.difference(state, fresh.state)
                if difference > tolerance[record.parity]:
                    kind = "history" if difference == float("inf") else "rows"
            yield Replayed(key, _digest(model, fresh.state), difference, kind)
    finally:
        rebuilt.close()


def copy_log(source: Path, target: Path) -> None:
    """Copy the event log as of one instant, whoever writes to it meanwhile."""
    import apsw

    name = "events.sqlite"
    read = apsw.Connection(str(source / name), flags=apsw.SQLITE_OPEN_READONLY)
    write = apsw.Connection(str(target / name))
    try:
        with write.backup("main", read, "main") as backup:
            backup.step()
    finally:
        write.close()
        read.close()
    (target / name).chmod(0o600)


def copy_states(source: Path, target: Path) -> None:
    """Copy the embedded cold store, where there is one, as of one instant; a damaged one is copied as it is."""
    import lmdb

    path = source / "cold.lmdb"
    if not path.exists():
        return
    try:
        with lmdb.open(str(path), subdir=False, readonly=True, max_dbs=2) as environment:
            environment.copy(str(target / path.name))
    except lmdb.Error:
        shutil.copyfile(path, target / path.name)


def _digest(model: Any, state: Any) -> str:
    """Return how many events a state has, their rolling hash and the SHA-256 of its bytes."""
    parts = model.dump(state)
    named = b"".join(parts.segments)  # named by their content
    return f"{state.num_events} {state.history_hash.hex()} {hashlib.sha256(parts.about + named).hexdigest()}"


verb = Verb(
    summary="rebuild every state from the event log and compare with the stored ones",
    example="ksa replay runs/demo --state-dir state/ --out state-replayed/",
    configure=_configure,
    run=_run,
)
