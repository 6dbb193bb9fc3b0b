"""The event log: the truth from which every state can be rebuilt. SQLite through apsw, one process, one writer.

What it promises:

- *Acknowledged means on disk.* A future resolves after its transaction is committed with `synchronous=FULL`.
- *Sending again is harmless.* Events are known by (user, event id), or by (user, item, time, type) where no id came.
  The same id with another payload is a conflict and changes nothing.
- *Sequence numbers* rise by commit and are never used twice. They are the arrival order of the log.
- *One order.* Events are read by `recsys_ksa.order`, arrival being the sequence number.
- *One writer.* A thread commits all calls that wait as one transaction (group commit); the directory is locked, so
  a second process is refused.

Tenant and generation (the number of a user's lives; a deletion will start a new one) are in the schema and the keys.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import apsw

from ksa_serving.errors import EventLogError, OverloadedError
from ksa_serving.events import NewEvent, Order, Owner, StoredEvent, is_late, sort_events
from ksa_serving.sqlite_file import FORMAT, check_sqlite_version, connect, lock_directory, open_writer, transaction
from recsys_ksa.order import TieKind

Outcome = Literal["accepted", "late", "duplicate", "conflict"]
COLUMNS = "seq, item_id, timestamp, event_id, event_type, value"


@dataclass(frozen=True)
class UserHead:
    """How far the log is with a user: all zero for one it does not know."""

    generation: int = 0
    num_events: int = 0
    last_seq: int = 0


@dataclass(frozen=True)
class AppendResult:
    """One outcome an event, in the order given; the user's head after them."""

    outcomes: list[Outcome]
    head: UserHead


@dataclass(frozen=True)
class _Call:
    owner: Owner
    events: Sequence[NewEvent]
    future: "Future[AppendResult]"


class EventLog:
    """An open event log. `submit` may be called from any thread; so may the readers."""

    def __init__(
        self,
        directory: Path,
        tie: TieKind,
        *,
        group_events: int = 4096,
        waiting_calls: int = 4096,
        clock: Callable[[], float] = time.time,
    ):
        """Open or create the log in `directory`, which exists.

        Args:
            tie: the data set's tie kind; decides the order in which events are read and which are late.
            group_events: most events in one transaction.
            waiting_calls: calls that may wait before others are refused.

        Raises:
            EventLogError: another process has it open, it is no event log, or SQLite is too old.
        """
        check_sqlite_version()
        self.tie: TieKind = tie
        self.healthy = True
        self._path = Path(directory) / "events.sqlite"
        self._group_events = group_events
        self._clock = clock
        self._lock_file = lock_directory(Path(directory))
        self._waiting: queue.Queue[_Call | None] = queue.Queue(waiting_calls)
        self._readers: queue.LifoQueue[apsw.Connection] = queue.LifoQueue()
        self._closing = threading.Lock()
        self._closed = False
        try:
            self._connection = open_writer(self._path)
        except apsw.Error as error:
            self._lock_file.close()
            raise EventLogError(f"{self._path}: expected an event log, got: {error}. Check --state-dir.") from error
        except EventLogError:
            self._lock_file.close()
            raise
        self._writer = threading.Thread(target=self._write_calls, name="event-log", daemon=True)
        self._writer.start()

    # -- writing ----------------------------------------------------------------------------------------------

    def submit(self, owner: Owner, events: Sequence[NewEvent]) -> "Future[AppendResult]":
        """Ask for `events` to be kept; the future resolves when they are on disk.

        Raises:
            OverloadedError: too many calls wait already.
            EventLogError: the log is closed. From the future: it could not be written; nothing of it was kept.
        """
        call = _Call(owner, events, Future())
        with self._closing:
            if self._closed:
                raise EventLogError("event log: expected an open log, got a closed one. The service is stopping.")
            try:
                self._waiting.put_nowait(call)
            except queue.Full:
                raise OverloadedError("event log: too many calls wait to be written. Try again in a second.") from None
        return call.future

    def append(self, owner: Owner, events: Sequence[NewEvent]) -> AppendResult:
        """Keep `events` and return when they are on disk."""
        return self.submit(owner, events).result()

    def probe(self) -> None:
        """Try to write without keeping anything, so that `healthy` tells of recovery also when no events come."""
        with contextlib.suppress(OverloadedError, EventLogError):
            self.submit(Owner(""), [])

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

    def _write_calls(self) -> None:
        open_ = True
        while open_:
            group, open_ = self._next_group()
            if group:
                self._commit(group)

    def _next_group(self) -> tuple[list[_Call], bool]:
        """Return all calls that wait, up to the size of one transaction, and whether more may come."""
        group: list[_Call] = []
        num_events = 0
        call = self._waiting.get()
        while call is not None:
            if call.future.set_running_or_notify_cancel():
                group.append(call)
                num_events += len(call.events)
            if num_events >= self._group_events:
                return group, True
            try:
                call = self._waiting.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _commit(self, group: list[_Call]) -> None:
        try:
            with transaction(self._connection):
                results = [self._insert(call) for call in group]
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
            for call, result in zip(group, results):
                call.future.set_result(result)

    def _insert(self, call: _Call) -> AppendResult:
        if not call.events:
            self._connection.pragma("user_version", FORMAT)  # a page is written, nothing changes
            user = _read_user(self._connection, call.owner)
            return AppendResult([], UserHead() if user is None else user[1])
        user_key, head = self._writer_user(call.owner)
        last = self._last_key(user_key, head)
        outcomes: list[Outcome] = []
        num_events, last_seq = head.num_events, head.last_seq
        for event in call.events:
            seq = self._insert_event(user_key, head.generation, event)
            if seq is None:
                outcomes.append(self._compare(user_key, head.generation, event))
                continue
            num_events, last_seq = num_events + 1, seq
            stored = StoredEvent(seq, event.item_id, event.timestamp, event.event_id, event.event_type, event.value)
            outcomes.append("late" if last is not None and is_late(stored, last, self.tie) else "accepted")
        if num_events > head.num_events:
            self._connection.execute(
                "UPDATE users SET num_events = ?, last_seq = ? WHERE user_key = ?", (num_events, last_seq, user_key)
            )
        return AppendResult(outcomes, UserHead(head.generation, num_events, last_seq))

    def _writer_user(self, owner: Owner) -> tuple[int, UserHead]:
        insert = "INSERT INTO users (tenant, user_id) VALUES (?, ?) ON CONFLICT DO NOTHING"
        self._connection.execute(insert, (owner.tenant, owner.user_id))
        user = _read_user(self._connection, owner)
        assert user is not None
        return user

    def _insert_event(self, user_key: int, generation: int, event: NewEvent) -> int | None:
        row = self._connection.execute(
            "INSERT INTO events (user_key, generation, identity, item_id, timestamp, event_id, event_type, value,"
            " received) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING seq",
            (
                user_key,
                generation,
                event.identity,
                event.item_id,
                event.timestamp,
                event.event_id,
                event.event_type,
                event.value,
                int(self._clock()),
            ),
        ).fetchone()
        return None if row is None else row[0]

    def _compare(self, user_key: int, generation: int, event: NewEvent) -> Outcome:
        """Return what an event is whose identity the log already has."""
        if event.event_id is None:
            return "duplicate"
        row = self._connection.execute(
            f"SELECT {COLUMNS} FROM events WHERE user_key = ? AND generation = ? AND identity = ?",
            (user_key, generation, event.identity),
        ).fetchone()
        assert row is not None
        return "duplicate" if _stored(row).has_payload(event) else "conflict"

    def _last_key(self, user_key: int, head: UserHead) -> Order | None:
        if not head.num_events:
            return None
        rows = self._connection.execute(
            f"SELECT {COLUMNS} FROM events WHERE user_key = ?1 AND generation = ?2 AND timestamp ="
            " (SELECT max(timestamp) FROM events WHERE user_key = ?1 AND generation = ?2)",
            (user_key, head.generation),
        ).fetchall()
        return max(_stored(row).order(self.tie) for row in rows)

    # -- reading ----------------------------------------------------------------------------------------------

    def head(self, owner: Owner) -> UserHead:
        """Return how far the log is with a user."""
        with self._reader() as connection:
            user = _read_user(connection, owner)
        return UserHead() if user is None else user[1]

    def read(self, owner: Owner, after_seq: int = 0) -> tuple[UserHead, list[StoredEvent]]:
        """Return a user's head and their events with seq > `after_seq` in the one order, both of one instant."""
        with self._reader() as connection, transaction(connection, "DEFERRED"):
            user = _read_user(connection, owner)
            if user is None:
                return UserHead(), []
            user_key, head = user
            rows = connection.execute(
                f"SELECT {COLUMNS} FROM events WHERE user_key = ? AND generation = ? AND seq > ?",
                (user_key, head.generation, after_seq),
            )
            events = [_stored(row) for row in rows]
        return head, sort_events(events, self.tie)

    def known(self, owner: Owner, events: Sequence[NewEvent], up_to_seq: int) -> list[bool]:
        """Return for each event whether the log has one of its identity, no newer than `up_to_seq`."""
        with self._reader() as connection:
            user = _read_user(connection, owner)
            if user is None:
                return [False] * len(events)
            user_key, head = user
            query = "SELECT 1 FROM events WHERE user_key = ? AND generation = ? AND identity = ? AND seq <= ?"
            keys = ((user_key, head.generation, event.identity, up_to_seq) for event in events)
            return [connection.execute(query, key).fetchone() is not None for key in keys]

    def counts(self) -> tuple[int, int]:
        """Return the number of users and of events."""
        with self._reader() as connection:
            return connection.execute("SELECT count(*), coalesce(sum(num_events), 0) FROM users").get

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


def _read_user(connection: apsw.Connection, owner: Owner) -> tuple[int, UserHead] | None:
    row = connection.execute(
        "SELECT user_key, generation, num_events, last_seq FROM users WHERE tenant = ? AND user_id = ?",
        (owner.tenant, owner.user_id),
    ).fetchone()
    return None if row is None else (row[0], UserHead(*row[1:]))


def _stored(row: Any) -> StoredEvent:
    return StoredEvent(*row)
