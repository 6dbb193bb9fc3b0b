"""`ksa replay`: rebuild every state from a copy of the event log, and compare what the cold store leads to.

The service may run on: its log and its cold store's file are copied as of one instant each, and nothing in its
directory is written. What is rebuilt, with a digest of each state, is a state directory of its own, put in place whole.

Until then it is made in NEW.part, beside it: the copies, and a *journal* with a line for each user who is done. Whoever
dies in between, `--resume` goes on with the users who are not in it, over the same copies: all of one instant still.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast

from recsys_ksa.cli import Verb
from recsys_ksa.durable import sync
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
JOURNAL = "replayed"
"""In NEW.part: a line a user, as they are done."""
ORIGIN = "origin"
"""In NEW.part: what is replayed; written once both copies are whole."""
SYNCED_EVERY = 5.0
"""Seconds between two times that the journal is put on the disk: so much is computed again after a loss of power."""
MOST_TOLD = 20
"""Users told of by their hashes."""


@dataclass(frozen=True)
class Replayed:
    """One user: the salted hash, the line of `DIGESTS`, and how a stored state compares (None: none was stored)."""

    key: str
    digest: str
    difference: float | None
    kind: Kind | None

    def line(self) -> str:
        """Return the user as a line of the journal."""
        return "\t".join("" if part is None else str(part) for part in astuple(self)) + "\n"

    @staticmethod
    def of(line: str) -> "Replayed":
        """Return the user of such a line."""
        key, digest, difference, kind = line.rstrip("\n").split("\t")
        return Replayed(key, digest, float(difference) if difference else None, cast("Kind", kind) if kind else None)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run that is served")
    parser.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="of a service, running or stopped")
    parser.add_argument("--out", type=Path, metavar="NEW", help="keep what is rebuilt; must not exist")
    parser.add_argument("--resume", action="store_true", help="go on with NEW.part, which a replay that ended has left")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, as given to `ksa serve`"
    )
    parser.add_argument("--store", default="lmdb", metavar="lmdb|URL", help="as given to `ksa serve`")


def _run(args: argparse.Namespace) -> None:
    if not (args.state_dir / "events.sqlite").is_file():
        raise UsageError(f"--state-dir: expected a service's directory, found none at {args.state_dir}.")
    if args.out is not None and args.out.exists():
        raise UsageError(f"--out: expected a new directory, got {args.out}, which exists.")
    if args.resume and args.out is None:
        raise UsageError("--resume: expected --out NEW too, which names what to go on with.")
    from ksa_serving.release import load_release
    from ksa_serving.settings import ServeSettings
    from recsys_ksa.config import load_config

    settings = load_config(ServeSettings, None, args.set)
    release = load_release(args.run, cold_parity=settings.cold_parity)
    with _workplace(args.out, args.resume) as folder:
        _copy_once(args, folder, f"{release.model_version} {settings.cold_parity} {settings.rebuild_step_events}")
        tally = _compare(args.store, folder, release, settings)
        if args.out is not None:
            _keep(folder, args.out)
    print(tally)
    if tally.kinds:
        raise SystemExit(1)


class _Tally:
    """What was compared so far."""

    def __init__(self) -> None:
        self.kinds: Counter[Kind] = Counter()
        self._found, self._worst = 0, 0.0
        self.counts: tuple[int, int] = (0, 0)
        """Users and events of the log."""

    def add(self, user: Replayed) -> None:
        """Count a user; tell of one who differs."""
        if user.difference is not None:
            self._found, self._worst = self._found + 1, max(self._worst, user.difference)
        if user.kind is not None:
            self.kinds[user.kind] += 1
            if self.kinds.total() <= MOST_TOLD:
                print(f"different: {user.kind} of user {user.key}")

    def __str__(self) -> str:
        """Return what a person is told at the end."""
        users, events = self.counts
        lines = [f"{events} events of {users} users; {self._found} states stored, largest difference {self._worst:.1e}"]
        if self.kinds:
            told = ", ".join(f"{kind}: {count}" for kind, count in sorted(self.kinds.items()))
            lines.append(f"{self.kinds.total()} users differ from their log by more than rounding ({told}).")
        if self.kinds["log"] < self.kinds.total():
            lines.append("Remove the cold store: it is rebuilt from the log.")
        return "\n".join(lines)


@contextlib.contextmanager
def _workplace(out: Path | None, resume: bool) -> Iterator[Path]:
    """Yield the folder to work in: NEW.part, which stays where the work ends early, or one that is removed."""
    if out is None:
        with TemporaryDirectory(prefix=".replay-") as name:
            yield Path(name)
        return
    part = out.with_name(out.name + ".part")
    if part.exists() and not resume:
        raise UsageError(f"--out: {part} is what a replay that ended early has left. Add --resume, or remove it.")
    if resume and not part.exists():
        raise UsageError(f"--resume: expected {part}, which a replay that ended early leaves; it is not there.")
    try:
        part.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: expected a place where {part} can be made, got: {error.strerror}.") from error
    yield part


def _copy_once(args: argparse.Namespace, folder: Path, model: str) -> None:
    """Copy log and cold store, unless that was done: then they must be this service's, and be for this run."""
    new, old, origin = folder / "new", folder / "old", folder / ORIGIN
    source = f"{_salt(args.state_dir).hex()} {model}\n"
    if origin.exists():
        if origin.read_text() != source:
            raise UsageError(
                f"--resume: {folder} was begun from another log, for another run, or with other settings. "
                "Give it what it was begun with, or remove it."
            )
        return
    (folder / JOURNAL).unlink(missing_ok=True)
    for copy in (new, old):  # of copying that was cut off nothing is used
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(mode=0o700)
    copy_log(args.state_dir, new)
    copy_states(args.state_dir, old)
    for path in (*new.iterdir(), *old.iterdir(), new, old):
        sync(path)
    whole = folder / f"{ORIGIN}.new"
    whole.write_text(source)
    sync(whole)
    whole.rename(origin)
    sync(folder)


def _compare(store: str, folder: Path, release: "Release", settings: "ServeSettings") -> _Tally:
    """Rebuild and compare everyone who is not in the journal; return what all together gave, the journal's too."""
    from ksa_serving.command import open_store
    from ksa_serving.event_log import EventLog

    new, tally = folder / "new", _Tally()
    for unclosed in folder.glob("*/cold.unclosed"):  # replays that were ended, however often, speak against no file
        unclosed.write_bytes(b"x")
    log = EventLog(new, release.tie)
    stored = open_store(store, folder / "old", {release.state_fingerprint: release.model}, log, settings)
    done = _journaled(folder / JOURNAL)
    try:
        log.check_file()
        tally.counts = log.counts()
        with (folder / JOURNAL).open("a") as journal:
            synced = time.monotonic()
            for user in done:
                tally.add(user)
            for user in replay(release, log, stored, new, settings, done):
                tally.add(user)
                journal.write(user.line())
                journal.flush()
                if time.monotonic() - synced > SYNCED_EVERY:
                    os.fsync(journal.fileno())
                    synced = time.monotonic()
    finally:
        stored.close()
        log.close()
    return tally


def _journaled(path: Path) -> list[Replayed]:
    """Return the users of a journal; a last line that was torn is cut off."""
    if not path.exists():
        return []
    lines = path.read_bytes()
    whole = lines[: lines.rfind(b"\n") + 1]
    if whole != lines:
        os.truncate(path, len(whole))
    return [Replayed.of(line) for line in whole.decode().splitlines()]


def _keep(folder: Path, out: Path) -> None:
    """Put what was rebuilt in place, with its digests, and remove the rest."""
    digests = folder / "new" / DIGESTS
    digests.write_text("".join(f"{user.key} {user.digest}\n" for user in _journaled(folder / JOURNAL)))
    sync(digests)
    (folder / "new").rename(out)
    sync(out.absolute().parent)
    shutil.rmtree(folder)


def _salt(state_dir: Path) -> bytes:
    """Return the own random bytes of a service's log, which tell it from others."""
    import apsw

    from ksa_serving.sqlite_file import salt_of

    connection = apsw.Connection(str(state_dir / "events.sqlite"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return salt_of(connection)
    finally:
        connection.close()


def replay(
    release: "Release",
    log: "EventLog",
    stored: "StateStore",
    folder: Path,
    settings: "ServeSettings",
    done: Sequence[Replayed] = (),
) -> Iterator[Replayed]:
    """Rebuild every user's state into a cold store in `folder`, and compare; one user is in memory at a time.

    A user is on the disk there when told of.

    Args:
        stored: what is compared; read, never written.
        done: users who were told of before, and are left out.

    Raises:
        UsageError: what was rebuilt of them is no longer there.
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
    keys = {user.key for user in done}
    try:
        if any(user.kind != "log" for user in done) and not len(rebuilt):
            raise UsageError(f"--resume: {folder.parent} has lost its states, for their file was damaged. Remove it.")
        for owner in progress(log.owners(), "replaying", unit=" users"):
            key = owner.key(log.salt).hex()
            if key in keys:
                continue
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
