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
- *One writer.* A thread commits all calls that wait as one transaction (group commit); the directory is locked, so
  a second process is refused.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import apsw

from ksa_serving.errors import EventLogError, OverloadedError
from ksa_serving.events import NewEvent, Order, Owner, StoredEvent, chain_after, is_late
from ksa_serving.sqlite_file import (
    FORMAT,
    check_sqlite_version,
    connect,
    lock_directory,
    open_writer,
    salt_of,
    transaction,
)
from ksa_serving.user_view import COLUMNS, UserHead, UserView, read_user, stored_event
from recsys_ksa.order import TieKind

Outcome = Literal["accepted", "late", "late-far", "duplicate", "conflict", "unknown"]
T = TypeVar("T")
PURGE_ROWS = 2000
"""Rows of forgotten users overwritten in one transaction, so that senders hardly wait."""


@dataclass(frozen=True)
class AppendResult:
    """One outcome an event, in the order given; the user's head after them."""

    outcomes: list[Outcome]
    head: UserHead


@dataclass(frozen=True)
class _Call(Generic[T]):
    """Work for the writer, done inside its transaction."""

    work: Callable[[], T]
    num_events: int
    future: "Future[T]"


class EventLog:
    """An open event log. `submit`, `retract`, `correct` and `forget` may be called from any thread; so may readers."""

    def __init__(
        self,
        directory: Path,
        tie: TieKind,
        *,
        group_events: int = 4096,
        waiting_calls: int = 4096,
        late_horizon: int | None = None,
        clock: Callable[[], float] = time.time,
        on_commit: Callable[[float, int], None] = lambda seconds, num_calls: None,
    ):
        """Open or create the log in `directory`, which exists.

        Args:
            tie: the data set's tie kind; decides the order in which events are read and which are late.
            group_events: most events in one transaction.
            waiting_calls: calls that may wait before others are refused.
            late_horizon: an event before more than so many others is `late-far`; None: there is no such thing.
            on_commit: told how long each commit took, fsync included, and how many calls it held.

        Raises:
            EventLogError: another process has it open, it is no event log, or SQLite is too old.
        """
        check_sqlite_version()
        self.tie: TieKind = tie
        self.healthy = True
        self.on_commit = on_commit
        self._path = Path(directory) / "events.sqlite"
        self._group_events = group_events
        self._late_horizon = late_horizon
        self._clock = clock
        self._lock_file = lock_directory(Path(directory))
        self._waiting: queue.Queue[_Call[Any] | None] = queue.Queue(waiting_calls)
        self._readers: queue.LifoQueue[apsw.Connection] = queue.LifoQueue()
        self._closing = threading.Lock()
        self._closed = False
        try:
            self._connection = open_writer(self._path)
            self.salt = salt_of(self._connection)
        except apsw.Error as error:
            self._lock_file.close()
            raise EventLogError(f"{self._path}: expected an event log, got: {error}. Check --state-dir.") from error
        except EventLogError:
            self._lock_file.close()
            raise
        self._purging = bool(self._connection.execute("SELECT 1 FROM purges").fetchone())
        self._writer = threading.Thread(target=self._write_calls, name="event-log", daemon=True)
        self._writer.start()

    # -- writing ----------------------------------------------------------------------------------------------

    def submit(self, owner: Owner, events: Sequence[NewEvent]) -> "Future[AppendResult]":
        """Ask for `events` to be kept; the future resolves when they are on disk.

        Raises:
            OverloadedError: too many calls wait already.
            EventLogError: the log is closed. From the future: it could not be written; nothing of it was kept.
        """
        return self._submit(lambda: self._insert(owner, events), len(events))

    def retract(self, owner: Owner, event_id: str) -> "Future[AppendResult]":
        """Ask for the event of this id to be taken back: accepted, duplicate (it was already) or unknown."""
        return self._submit(lambda: self._retract(owner, event_id), 1)

    def correct(self, owner: Owner, event: NewEvent) -> "Future[AppendResult]":
        """Ask for `event` to take the place of the one that has its id; kept as new where none has."""
        return self._submit(lambda: self._correct(owner, event), 1)

    def forget(self, owner: Owner) -> "Future[int]":
        """Ask for all of a user to be deleted; the future tells how many events went."""
        return self._submit(lambda: self._forget(owner), 1)

    def append(self, owner: Owner, events: Sequence[NewEvent]) -> AppendResult:
        """Keep `events` and return when they are on disk."""
        return self.submit(owner, events).result()

    @property
    def num_waiting(self) -> int:
        """Calls that wait for the writer."""
        return self._waiting.qsize()

    @property
    def purging(self) -> bool:
        """Whether rows of forgotten users are still to be overwritten."""
        return self._purging

    def probe(self) -> None:
        """Try to write without keeping anything, so that `healthy` tells of recovery also when no events come."""
        with contextlib.suppress(OverloadedError, EventLogError):
            self._submit(lambda: self._connection.pragma("user_version", FORMAT), 0)  # a page is written

    def close(self) -> None:
        """Write what waits, then close. Safe to call twice."""
        with self._closing:
            first, self._closed = not self._closed, True
        if not first:
            return
        self._waiting.put(None)
        self._writer.join()
        while not self._readers.empty():
            self._readers.get_nowait().close()
        self._connection.close()
        self._lock_file.close()

    def _submit(self, work: Callable[[], T], num_events: int) -> "Future[T]":
        call = _Call(work, num_events, Future())
        with self._closing:
            if self._closed:
                raise EventLogError("event log: expected an open log, got a closed one. The service is stopping.")
            try:
                self._waiting.put_nowait(call)
            except queue.Full:
                raise OverloadedError("event log: too many calls wait to be written. Try again in a second.") from None
        return call.future

    def _write_calls(self) -> None:
        open_ = True
        while open_:
            group, open_ = self._next_group()
            if group:
                self._commit(group)
            elif self._purging:
                self._purge()

    def _next_group(self) -> tuple[list[_Call[Any]], bool]:
        """Return all calls that wait, up to the size of one transaction, and whether more may come."""
        group: list[_Call[Any]] = []
        num_events = 0
        try:
            call = self._waiting.get(block=not self._purging)
        except queue.Empty:
            return group, True
        while call is not None:
            if call.future.set_running_or_notify_cancel():
                group.append(call)
                num_events += call.num_events
            if num_events >= self._group_events:
                return group, True
            try:
                call = self._waiting.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _commit(self, group: list[_Call[Any]]) -> None:
        began = time.perf_counter()
        try:
            with transaction(self._connection):
                results = [call.work() for call in group]
        except Exception as error:
            if len(group) > 1:  # one call must not fail its neighbours
                for call in group:
                    self._commit([call])
                return
            self.healthy = not isinstance(error, (apsw.Error, OSError))
            reason = EventLogError(f"event log: cannot be written: {error}. Nothing of this call was kept; try again.")
            reason.__cause__ = error
            group[0].future.set_exception(reason)
        else:
            self.healthy = True
            self.on_commit(time.perf_counter() - began, len(group))
            for call, result in zip(group, results):
                call.future.set_result(result)

    # -- the writer's work, inside its transaction ------------------------------------------------------------

    def _insert(self, owner: Owner, events: Sequence[NewEvent]) -> AppendResult:
        user_key, head = self._writer_user(owner)
        last = self._last_order(user_key, head)
        outcomes: list[Outcome] = []
        before = head
        for event in events:
            kept = self._insert_event(user_key, head, event)
            if kept is None:
                outcomes.append(self._compare(user_key, head.generation, event))
                continue
            seq, chain = kept
            head = UserHead(head.generation, head.num_events + 1, seq, chain)
            stored = StoredEvent(seq, event.item_id, event.timestamp, event.event_id, event.event_type, event.value)
            late = last is not None and is_late(stored, last, self.tie)
            outcomes.append(self._how_late(user_key, head, stored) if late else "accepted")
        if head != before:
            self._save_head(user_key, head)
        return AppendResult(outcomes, head)

    def _retract(self, owner: Owner, event_id: str) -> AppendResult:
        user_key, head = self._writer_user(owner)
        found = self._find(user_key, head.generation, event_id)
        if found is None:
            return AppendResult(["unknown"], head)
        if not found[1]:
            return AppendResult(["duplicate"], head)
        head = self._bury(user_key, head, found[0], b"i" + event_id.encode())
        return AppendResult(["accepted"], head)

    def _correct(self, owner: Owner, event: NewEvent) -> AppendResult:
        assert event.event_id is not None
        user_key, head = self._writer_user(owner)
        found = self._find(user_key, head.generation, event.event_id)
        if found is None:
            return self._insert(owner, [event])
        old, live = found
        if live and old.has_payload(event):
            return AppendResult(["duplicate"], head)
        freed = b"x" + old.seq.to_bytes(8, "big")
        if live:
            self._bury(user_key, head, old, freed)
        else:
            self._connection.execute("UPDATE events SET identity = ? WHERE seq = ?", (freed, old.seq))
        return self._insert(owner, [event])

    def _bury(self, user_key: int, head: UserHead, event: StoredEvent, identity: bytes) -> UserHead:
        """Write a tombstone for a live event, wipe its payload, and return the head after it."""
        chain = chain_after(head.chain, "retract", event.seq)
        row = self._connection.execute(
            "INSERT INTO events (user_key, generation, identity, live, retracts, item_id, timestamp, received, chain)"
            " VALUES (?, ?, ?, 0, ?, '', ?, ?, ?) RETURNING seq",
            (
                user_key,
                head.generation,
                b"t" + event.seq.to_bytes(8, "big"),
                event.seq,
                event.timestamp,
                int(self._clock()),
                chain,
            ),
        ).fetchone()
        assert row is not None
        self._connection.execute(
            "UPDATE events SET live = 0, item_id = '', event_type = NULL, value = NULL, identity = ? WHERE seq = ?",
            (identity, event.seq),
        )
        head = UserHead(head.generation, head.num_events - 1, row[0], chain)
        self._save_head(user_key, head)
        return head

    def _forget(self, owner: Owner) -> int:
        user = read_user(self._connection, owner.key(self.salt))
        if user is None:
            return 0
        user_key, head = user
        self._connection.execute(
            "UPDATE users SET tenant = NULL, user_id = NULL, generation = generation + 1, num_events = 0,"
            " last_seq = 0, chain = x'' WHERE user_key = ?",
            (user_key,),
        )
        self._connection.execute("INSERT INTO purges VALUES (?) ON CONFLICT DO NOTHING", (user_key,))
        self._purging = True
        return head.num_events

    def _purge(self) -> None:
        """Overwrite some rows of forgotten users; when none are left, empty the write-ahead log too."""
        try:
            with transaction(self._connection):
                row = self._connection.execute("SELECT user_key FROM purges LIMIT 1").fetchone()
                if row is not None:
                    self._connection.execute(
                        "DELETE FROM events WHERE seq IN (SELECT e.seq FROM events e JOIN users u USING (user_key)"
                        f" WHERE e.user_key = ? AND e.generation < u.generation LIMIT {PURGE_ROWS})",
                        row,
                    )
                    if self._connection.changes() < PURGE_ROWS:
                        self._connection.execute("DELETE FROM purges WHERE user_key = ?", row)
            if row is None:
                self._connection.pragma("wal_checkpoint(TRUNCATE)")
                self._purging = False
        except apsw.BusyError:
            time.sleep(0.05)  # a reader still looks at the old pages
        except apsw.Error:
            self.healthy = False
            time.sleep(0.5)

    def _save_head(self, user_key: int, head: UserHead) -> None:
        self._connection.execute(
            "UPDATE users SET num_events = ?, last_seq = ?, chain = ? WHERE user_key = ?",
            (head.num_events, head.last_seq, head.chain, user_key),
        )

    def _writer_user(self, owner: Owner) -> tuple[int, UserHead]:
        key = owner.key(self.salt)
        self._connection.execute(
            "INSERT INTO users (owner_key, tenant, user_id) VALUES (?, ?, ?) ON CONFLICT (owner_key) DO UPDATE SET"
            " tenant = excluded.tenant, user_id = excluded.user_id WHERE user_id IS NULL",
            (key, owner.tenant, owner.user_id),
        )
        user = read_user(self._connection, key)
        assert user is not None
        return user

    def _insert_event(self, user_key: int, head: UserHead, event: NewEvent) -> tuple[int, bytes] | None:
        """Return the sequence number and rolling hash of a new row, or None where its identity is known."""
        chain = chain_after(head.chain, event.identity, event.item_id, event.timestamp, event.event_type, event.value)
        row = self._connection.execute(
            "INSERT INTO events (user_key, generation, identity, item_id, timestamp, event_id, event_type, value,"
            " received, chain) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING seq",
            (
                user_key,
                head.generation,
                event.identity,
                event.item_id,
                event.timestamp,
                event.event_id,
                event.event_type,
                event.value,
                int(self._clock()),
                chain,
            ),
        ).fetchone()
        return None if row is None else (row[0], chain)

    def _compare(self, user_key: int, generation: int, event: NewEvent) -> Outcome:
        """Return what an event is whose identity the log already has."""
        if event.event_id is None:
            return "duplicate"
        found = self._find(user_key, generation, event.event_id)
        assert found is not None
        old, live = found
        return "duplicate" if not live or old.has_payload(event) else "conflict"

    def _how_late(self, user_key: int, head: UserHead, event: StoredEvent) -> Outcome:
        if self._late_horizon is None:
            return "late"
        after = self._connection.execute(
            "SELECT count(*) FROM (SELECT 1 FROM events WHERE user_key = ? AND generation = ? AND live = 1"
            " AND timestamp > ? LIMIT ?)",
            (user_key, head.generation, event.timestamp, self._late_horizon + 1),
        ).fetchone()
        return "late-far" if after is not None and after[0] > self._late_horizon else "late"

    def _find(self, user_key: int, generation: int, event_id: str) -> tuple[StoredEvent, bool] | None:
        """Return the event of this id and whether it is live."""
        row = self._connection.execute(
            f"SELECT live, {COLUMNS} FROM events WHERE user_key = ? AND generation = ? AND identity = ?",
            (user_key, generation, b"i" + event_id.encode()),
        ).fetchone()
        return None if row is None else (stored_event(row[1:]), bool(row[0]))

    def _last_order(self, user_key: int, head: UserHead) -> Order | None:
        if not head.num_events:
            return None
        rows = self._connection.execute(
            f"SELECT {COLUMNS} FROM events WHERE user_key = ?1 AND generation = ?2 AND live = 1 AND timestamp ="
            " (SELECT max(timestamp) FROM events WHERE user_key = ?1 AND generation = ?2 AND live = 1)",
            (user_key, head.generation),
        ).fetchall()
        return max(stored_event(row).order(self.tie) for row in rows)

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

    def owners(self) -> list[Owner]:
        """Return everyone who has events."""
        with self._reader() as connection:
            rows = connection.execute("SELECT user_id, tenant FROM users WHERE num_events > 0 ORDER BY user_key")
            return [Owner(user_id, tenant) for user_id, tenant in rows]

    def counts(self) -> tuple[int, int]:
        """Return the number of users and of events."""
        with self._reader() as connection:
            query = "SELECT count(*), coalesce(sum(num_events), 0) FROM users WHERE user_id IS NOT NULL"
            return connection.execute(query).get

    @contextlib.contextmanager
    def _reader(self) -> Iterator[apsw.Connection]:
        try:
            connection = self._readers.get_nowait()
        except queue.Empty:
            connection = connect(self._path, apsw.SQLITE_OPEN_READONLY)
        try:
            yield connection
        except apsw.Error as error:
            raise EventLogError(f"event log: cannot be read: {error}. See the service's log.") from error
        finally:
            self._readers.put(connection)
