"""The event log: the truth from which every state can be rebuilt. SQLite through apsw, one process, one writer.

What it promises:

- *Acknowledged means on disk.* A future resolves after its transaction is committed with `synchronous=FULL`.
- *Sending again is harmless.* Events are known by (user, event id), or by (user, item, time, type) where no id came.
  The same id with another payload is a conflict and changes nothing.
- *Sequence numbers* rise by commit and are never used twice. They are the arrival order of the log.
- *Retracting* an event writes a tombstone with a sequence number of its own and wipes the event's payload; its id
  stays known, so a sender that tries again does not bring it back. *Correcting* one retracts it and keeps the new
  payload under the same id, as a new arrival.
- *Forgetting* a user starts a new generation at once; rows of older ones are overwritten in the background, also after
  a crash, and the write-ahead log is emptied behind them.
- *A rolling hash* over a user's entries is kept with each, so whoever remembers one can prove it came from this log.
- *Owned users.* A process that was given a part of the users (`shards.py`) refuses to write others', in the same
  transactions: what is read out after the refusal began is all there is.
- *One writer.* A thread commits all calls that wait as one transaction (group commit); the directory is locked, so
  a second process is refused.
"""

import contextlib
import math
import queue
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import apsw
import msgspec

from ksa_serving.errors import EventLogError
from ksa_serving.events import NewEvent, Owner, StoredEvent
from ksa_serving.log_entries import AppendResult, LogEntries
from ksa_serving.log_writer import LogWriter
from ksa_serving.shard_rows import Cursor, Page, Tally, not_owned, read_page, tally
from ksa_serving.shards import Ownership
from ksa_serving.sqlite_file import (
    check_sqlite_version,
    connect,
    lock_directory,
    open_writer,
    salt_of,
    transaction,
)
from ksa_serving.user_view import UserHead, UserView, read_user
from recsys_ksa.order import TieKind

DAMAGE = (apsw.Error, UnicodeDecodeError, msgspec.DecodeError)
"""What reading a damaged file raises."""


class EventLog:
    """An open event log. Every method may be called from any thread."""

    def __init__(
        self,
        directory: Path,
        tie: TieKind,
        *,
        group_events: int = 4096,
        waiting_calls: int = 4096,
        late_horizon: int | None = None,
        user_events: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """Open or create the log in `directory`, which exists.

        Args:
            tie: the data set's tie kind; decides the order in which events are read and which are late.
            group_events: most events in one transaction.
            waiting_calls: calls that may wait before others are refused.
            late_horizon: an event before more than so many others is `late-far`; None: there is no such thing.
            user_events: of one user; one more is `full`. None: no bound.

        Raises:
            EventLogError: another process has it open, it is no event log, or SQLite is too old.
        """
        check_sqlite_version()
        self.tie: TieKind = tie
        self._path = Path(directory) / "events.sqlite"
        self._readers: queue.LifoQueue[apsw.Connection] = queue.LifoQueue()
        with contextlib.ExitStack() as opened:
            self._lock_file = opened.enter_context(lock_directory(Path(directory)))
            try:
                self._connection = open_writer(self._path)
                opened.callback(self._connection.close, force=True)
                self.salt = salt_of(self._connection)
                self._entries = LogEntries(self._connection, self.salt, tie, late_horizon, clock, user_events)
                self.writer = LogWriter(self._connection, self._entries, group_events, waiting_calls)
            except DAMAGE as error:
                raise EventLogError(f"{self._path}: expected an event log, got: {error}. Check --state-dir.") from error
            opened.pop_all()  # until `close`

    # -- writing ----------------------------------------------------------------------------------------------

    def submit(self, owner: Owner, events: Sequence[NewEvent], deadline: float = math.inf) -> "Future[AppendResult]":
        """Ask for `events` to be kept; the future resolves when they are on disk.

        Args:
            deadline: on `time.monotonic`'s clock; they are kept in a transaction that begins before it, or not at all.
                So it is with `retract`, `correct` and `forget`.

        Raises:
            OverloadedError: too many calls wait already.
            EventLogError: the log is closed. From the future: it could not be written; nothing of it was kept.
            DeadlineError: from the future: it passed; nothing of it was kept.
        """
        insert = partial(self._entries.insert, owner, events)
        return self.writer.submit(insert, len(events), (owner, events), deadline)

    def retract(self, owner: Owner, event_id: str, deadline: float = math.inf) -> "Future[AppendResult]":
        """Ask for the event of this id to be taken back: accepted, duplicate (it was already) or unknown."""
        return self.writer.submit(lambda: self._entries.retract(owner, event_id), 1, deadline=deadline)

    def correct(self, owner: Owner, event: NewEvent, deadline: float = math.inf) -> "Future[AppendResult]":
        """Ask for `event` to take the place of the one that has its id; kept as new where none has."""
        return self.writer.submit(lambda: self._entries.correct(owner, event), 1, deadline=deadline)

    def forget(self, owner: Owner, deadline: float = math.inf) -> "Future[int]":
        """Ask for all of a user to be deleted; the future tells how many events went."""

        def forget() -> int:
            self.writer.purging = True
            return self._entries.forget(owner)

        return self.writer.submit(forget, 1, deadline=deadline)

    def append(self, owner: Owner, events: Sequence[NewEvent]) -> AppendResult:
        """Keep `events` and return when they are on disk."""
        return self.submit(owner, events).result()

    def own(self, ownership: Ownership) -> "Future[None]":
        """Ask that from here on, and after a restart, only what `ownership` allows is written.

        From the future: ShardError where it is the first one, and users kept here are others' by it.
        """
        return self.writer.submit(lambda: self._entries.own(ownership), 1)

    def keep_page(self, page: Page) -> "Future[None]":
        """Ask for users of another log to be kept; from the future: ShardError where some are here already."""
        return self.writer.submit(lambda: self._entries.keep_page(page), sum(len(user.entries) for user in page.users))

    def let_go(self, owners: Sequence[Owner]) -> "Future[None]":
        """Ask for users to be taken out who are another log's now."""

        def let_go() -> None:
            self.writer.purging = True
            self._entries.let_go(owners)

        return self.writer.submit(let_go, len(owners))

    @property
    def ownership(self) -> Ownership | None:
        """Whose users may be written; None: everyone's."""
        return self._entries.ownership

    @property
    def purging(self) -> bool:
        """Whether rows of forgotten users are still to be overwritten."""
        return self.writer.purging

    def close(self) -> None:
        """Write what waits, then close. Safe to call twice."""
        if not self.writer.close():
            return
        try:
            while not self._readers.empty():
                self._readers.get_nowait().close()
            self._connection.close()
        finally:  # the next one may open it, whatever the disk does
            self._lock_file.close()

    # -- reading ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def view(self, owner: Owner) -> Iterator[UserView]:
        """Look at one user's events at one instant."""
        with self._reader() as connection, transaction(connection, "DEFERRED"):
            yield UserView(connection, read_user(connection, owner.key(self.salt)), self.tie)

    def head(self, owner: Owner) -> UserHead:
        """Return how far the log is with a user."""
        with self._reader() as connection:
            user = read_user(connection, owner.key(self.salt))
        return UserHead() if user is None else user[1]

    def read(self, owner: Owner) -> tuple[UserHead, list[StoredEvent]]:
        """Return a user's head and all their events in the one order, both of one instant."""
        with self.view(owner) as view:
            return view.head, view.newest(view.head.num_events)

    def check(self) -> None:
        """Compare the whole log with its rolling hashes.

        Raises:
            EventLogError: something is not what was kept.
        """
        self.check_file()
        for owner in self.owners():
            with self.view(owner) as view:
                view.check()

    def check_file(self) -> None:
        """Have SQLite look through its file.

        Raises:
            EventLogError: it is damaged.
        """
        with self._reader() as connection:
            found = str(connection.pragma("integrity_check", 1))
        if found != "ok":
            raise EventLogError(f"event log: expected a sound file, got: {found}.")

    def owners(self) -> list[Owner]:
        """Return everyone who has events."""
        with self._reader() as connection:
            rows = connection.execute("SELECT user_id, tenant FROM users WHERE num_events > 0 ORDER BY user_key")
            return [Owner(user_id, tenant) for user_id, tenant in rows]

    def deleted(self) -> frozenset[bytes]:
        """Return the keys (`Owner.key`) of all users who were deleted and have not come back."""
        with self._reader() as connection:
            rows = connection.execute("SELECT owner_key FROM users WHERE user_id IS NULL AND length(owner_key) = 16")
            return frozenset(key for (key,) in rows)

    def counts(self) -> tuple[int, int]:
        """Return the number of users and of events."""
        with self._reader() as connection:
            query = "SELECT count(*), coalesce(sum(num_events), 0) FROM users WHERE user_id IS NOT NULL"
            return connection.execute(query).get

    def read_page(self, shards: Collection[int], move: str, source: str, after: Cursor) -> Page:
        """Return what follows `after` of all users in virtual shards that move."""
        with self._reader() as connection, transaction(connection, "DEFERRED"):
            return read_page(connection, shards, move, source, after)

    def tally(self, shards: Collection[int]) -> Tally:
        """Return what the log holds of all users in `shards`."""
        with self._reader() as connection, transaction(connection, "DEFERRED"):
            return tally(connection, shards)

    def not_owned(self, ownership: Ownership, most: int) -> list[Owner]:
        """Return some users whom `ownership` gives to others."""
        with self._reader() as connection:
            return not_owned(connection, ownership, most)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[apsw.Connection]:
        connection: apsw.Connection | None = None
        try:
            try:
                connection = self._readers.get_nowait()
            except queue.Empty:
                connection = connect(self._path, apsw.SQLITE_OPEN_READONLY)
            yield connection
        except DAMAGE as error:
            raise EventLogError(f"event log: cannot be read: {error}. See the service's log.") from error
        finally:
            if connection is not None:
                self._readers.put(connection)
