"""One user's events at one instant of the event log: all that states ask of it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apsw
from msgspec import Struct

from ksa_serving.errors import EventLogError
from ksa_serving.events import Meeting, NewEvent, StoredEvent, chain_after, sort_events
from recsys_ksa.order import TieKind

COLUMNS = "seq, item_id, timestamp, event_id, event_type, value"


class UserHead(Struct, frozen=True):
    """How far the log is with a user: all zero for one it does not know."""

    generation: int = 0
    num_events: int = 0
    last_seq: int = 0
    chain: bytes = b""
    """Rolling hash of everything kept and retracted, in order of arrival."""


class Changes(Struct, frozen=True):
    """What happened after a sequence number: events new and live, in order; times of known ones since retracted."""

    added: list[StoredEvent]
    retracted: list[int]


class UserView:
    """Reads inside one transaction; use it from `EventLog.view`."""

    def __init__(self, connection: apsw.Connection, user: tuple[int, UserHead] | None, tie: TieKind):
        self._connection = connection
        self._tie: TieKind = tie
        self._user_key, self.head = user or (0, UserHead())
        self._key = (self._user_key, self.head.generation)

    def chain_at(self, seq: int) -> bytes | None:
        """Return the rolling hash after entry `seq`, or None where this user has no such entry."""
        if seq == 0:
            return b""
        row = self._connection.execute(
            "SELECT chain FROM events WHERE user_key = ? AND generation = ? AND seq = ?", (*self._key, seq)
        ).fetchone()
        return None if row is None else row[0]

    def changes(self, after_seq: int) -> Changes:
        """Return what happened after `after_seq`."""
        found = self._connection.execute(
            f"SELECT live, retracts, {COLUMNS} FROM events WHERE user_key = ? AND generation = ? AND seq > ?",
            (*self._key, after_seq),
        )
        rows: list[Any] = found.fetchall()
        added = [stored_event(row[2:]) for row in rows if row[0]]
        retracted = [stored_event(row[2:]).timestamp for row in rows if row[1] is not None and row[1] <= after_seq]
        return Changes(sort_events(added, self._tie), retracted)

    def count_from(self, timestamp: int) -> int:
        """Return how many events are at `timestamp` or later."""
        row = self._connection.execute(
            "SELECT count(*) FROM events WHERE user_key = ? AND generation = ? AND live = 1 AND timestamp >= ?",
            (*self._key, timestamp),
        ).fetchone()
        assert row is not None
        return row[0]

    def newest(self, count: int) -> list[StoredEvent]:
        """Return the last `count` events in the one order.

        Raises:
            EventLogError: there are fewer: the log is damaged.
        """
        if count == 0:
            return []
        oldest = self._connection.execute(
            "SELECT timestamp FROM events WHERE user_key = ? AND generation = ? AND live = 1"
            " ORDER BY timestamp DESC LIMIT 1 OFFSET ?",
            (*self._key, count - 1),
        ).fetchone()
        rows = self._connection.execute(
            f"SELECT {COLUMNS} FROM events WHERE user_key = ? AND generation = ? AND live = 1 AND timestamp >= ?",
            (*self._key, oldest[0] if oldest else 0),
        )
        events = sort_events([stored_event(row) for row in rows], self._tie)
        if len(events) < count:
            raise EventLogError(f"event log: expected {count} events of a user, got {len(events)}: damaged.")
        return events[-count:]

    def between(self, first: int, last: int) -> list[StoredEvent]:
        """Return the events of indices `first` to `last`, last included; fewer where the history ends before."""
        (events,) = self.spans([(first, last)])
        return events

    def spans(self, spans: Sequence[tuple[int, int]]) -> list[list[StoredEvent]]:
        """Return `between` of each of several spans, in any order."""
        ordered = sorted(set(spans))
        found = dict(zip(ordered, self.walk(ordered)))
        return [found[span] for span in spans]

    def walk(self, spans: Iterable[tuple[int, int]]) -> Iterator[list[StoredEvent]]:
        """Yield `between` of each of several spans, none of which begins before the last; goes through times once."""
        time, earlier = 0, 0  # how many events are before a time
        for first, last in spans:
            last_there = min(last, self.head.num_events - 1)
            low = self._place(first, time, earlier) if first <= last_there else None
            if low is None:
                yield []
                continue
            time, earlier = low
            high, _ = self._place(last_there, time, earlier) or low
            events = sort_events(self._within(time, high), self._tie)
            yield events[first - earlier : last_there - earlier + 1]

    def meetings(self, item_id: str) -> list[Meeting]:
        """Return where the history has an item, in the one order; the user's other events become no objects."""
        by_time: Iterator[Any] = self._connection.execute(
            "SELECT timestamp, count(*) FROM events WHERE user_key = ? AND generation = ? AND live = 1 AND item_id = ?"
            " GROUP BY timestamp ORDER BY timestamp",
            (*self._key, item_id),
        )
        meetings, before, earlier = list[Meeting](), 0, 0
        for time, num_meetings in by_time:
            earlier += self._count(before, time - 1)
            before = time
            tied = [item_id] * num_meetings
            if self._count(time, time) > num_meetings:
                tied = [event.item_id for event in sort_events(self._within(time, time), self._tie)]
            meetings += [Meeting(earlier + n, time) for n, item in enumerate(tied) if item == item_id]
        return meetings

    def item_ids(self) -> Iterator[str]:
        """Yield the item of each event, in no order."""
        query = "SELECT item_id FROM events WHERE user_key = ? AND generation = ? AND live = 1"
        rows: Iterator[Any] = self._connection.execute(query, self._key)
        return (item_id for (item_id,) in rows)

    def _place(self, index: int, time: int, earlier: int) -> tuple[int, int] | None:
        """Return the time of the event of an index and how many events are before that time; None beyond the end.

        Args:
            time, earlier: at most the event's time, and how many events are before: where to walk from.
        """
        found = self._connection.execute(
            "SELECT timestamp, seq FROM events WHERE user_key = ? AND generation = ? AND live = 1 AND timestamp >= ?"
            " ORDER BY timestamp, seq LIMIT 1 OFFSET ?",
            (*self._key, time, index - earlier),
        ).fetchone()
        if found is None:
            return None
        tied = self._connection.execute(
            "SELECT count(*) FROM events WHERE user_key = ? AND generation = ? AND live = 1"
            " AND timestamp = ? AND seq < ?",
            (*self._key, *found),
        ).fetchone()
        assert tied is not None
        return found[0], index - tied[0]

    def _count(self, low: int, high: int) -> int:
        """Return how many events are at times `low` to `high`, both included."""
        row = self._connection.execute(
            "SELECT count(*) FROM events WHERE user_key = ? AND generation = ? AND live = 1"
            " AND timestamp BETWEEN ? AND ?",
            (*self._key, low, high),
        ).fetchone()
        assert row is not None
        return row[0]

    def _within(self, low: int, high: int) -> list[StoredEvent]:
        """Return the events at times `low` to `high`, both included, in no order."""
        rows = self._connection.execute(
            f"SELECT {COLUMNS} FROM events WHERE user_key = ? AND generation = ? AND live = 1"
            " AND timestamp BETWEEN ? AND ?",
            (*self._key, low, high),
        )
        return [stored_event(row) for row in rows]

    def check(self) -> None:
        """Compare all entries of a user who has some with their rolling hashes; of what was retracted nothing is left.

        Raises:
            EventLogError: one is not what was kept.
        """
        rows: Iterator[Any] = self._connection.execute(
            f"SELECT live, chain, identity, {COLUMNS} FROM events WHERE user_key = ? AND generation = ? ORDER BY seq",
            self._key,
        )
        before, found = b"", list[StoredEvent]()
        for live, chain, identity, *columns in rows:
            if live:
                found.append(stored_event(columns))
                _, *told = columns
                event = NewEvent(*told)
                payload = (event.item_id, event.timestamp, event.event_type, event.value)
                if event.identity != identity or chain_after(before, identity, *payload) != chain:
                    raise EventLogError("event log: expected the event that its hash names, got another: damaged.")
            before = chain
        if (
            not before
            or before != self.head.chain
            or sort_events(found, self._tie) != self.newest(self.head.num_events)
        ):
            raise EventLogError("event log: expected the events that a user's hash names, got others: damaged.")

    def known(self, events: Sequence[NewEvent], up_to_seq: int) -> list[bool]:
        """Return for each event whether the log has one of its identity, no newer than `up_to_seq`."""
        query = "SELECT 1 FROM events WHERE user_key = ? AND generation = ? AND identity = ? AND seq <= ?"
        keys = ((*self._key, event.identity, up_to_seq) for event in events)
        return [self._connection.execute(query, key).fetchone() is not None for key in keys]


def read_user(connection: apsw.Connection, owner_key: bytes) -> tuple[int, UserHead] | None:
    """Return a user's row number and head; None for one the log never met."""
    row = connection.execute(
        "SELECT user_key, generation, num_events, last_seq, chain FROM users WHERE owner_key = ?", (owner_key,)
    ).fetchone()
    return None if row is None else (row[0], UserHead(*row[1:]))


def stored_event(row: Sequence[Any]) -> StoredEvent:
    """Return the event of a row of `COLUMNS`."""
    return StoredEvent(*row)
