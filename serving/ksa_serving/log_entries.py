"""What the event log does inside its writer's transactions: insert, retract, correct, forget, overwrite."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain as joined
from typing import Any, Literal

import apsw
from msgspec import Struct

from ksa_serving.errors import ShardError
from ksa_serving.events import NewEvent, Owner, StoredEvent, chain_after, is_late
from ksa_serving.lateness import Lateness
from ksa_serving.page_gaps import owe_wiping
from ksa_serving.shard_rows import Page, generation_elsewhere, highest_seq, keep_page, let_go, not_owned
from ksa_serving.shards import Ownership
from ksa_serving.sqlite_file import keep_ownership, ownership_of
from ksa_serving.user_view import COLUMNS, UserHead, read_user, stored_event
from recsys_ksa.order import TieKind

Outcome = Literal["accepted", "late", "late-far", "duplicate", "conflict", "full", "unknown"]
MAX_KNOWN_USERS = 10_000
"""Users whose heads the writer remembers, the last active ones."""
PURGE_ROWS = 2000
"""Rows of forgotten users overwritten in one transaction, so that senders hardly wait."""
ROWS_AT_ONCE = 256
"""Most rows in one statement."""


@dataclass(frozen=True)
class AppendResult:
    """One outcome an event, in the order given; the user's head after them; how many events lie after the earliest late
    one (`Lateness`).
    """

    outcomes: list[Outcome]
    head: UserHead
    events_after: int = 0


class _User(Struct, frozen=True):
    """What the writer knows of a user. last: the last live event in the one order."""

    key: int
    head: UserHead
    last: StoredEvent | None


class LogEntries:
    """The log's rows as its writer changes them. Every method is called inside a transaction, by one thread.

    There is no other writer, so what it knows of the last active users stays true, and after a transaction that failed
    all is read anew when it is next needed (`reset`: the disk may fail just now). What a transaction inserts is looked
    up together before (`look_up`), and written together, with the users' heads, by `save`: Python's lock is given back
    at every statement, and beside busy threads each waits to have it again.

    ownership: whose users may be written, as committed; None: everyone's.

    Args:
        late_horizon: an event before more than so many others is `late-far`; None: there is no such thing.
        user_events: of one user; one more is `full`. None: no bound.
    """

    def __init__(
        self,
        connection: apsw.Connection,
        salt: bytes,
        tie: TieKind,
        late_horizon: int | None,
        clock: Callable[[], float],
        user_events: int | None = None,
    ):
        self._connection = connection
        self._salt = salt
        self._tie: TieKind = tie
        self._late_horizon = late_horizon
        self._lateness = None if late_horizon is None else Lateness(connection, late_horizon)
        self._user_events = math.inf if user_events is None else user_events
        self._clock = clock
        self._users: OrderedDict[Owner, _User] = OrderedDict()
        self._unsaved: dict[Owner, None] = {}  # in one order: what is written replays
        self._rows: list[tuple[Any, ...]] = []
        self._is_known: dict[tuple[int, bytes], bool] = {}
        self._seq: int | None = None
        self.ownership = ownership_of(connection)
        self._coming: Ownership | None = None

    def look_up(self, calls: Iterable[tuple[Owner, Sequence[NewEvent]]]) -> None:
        """Find out at once which of the events of several `insert` the log has already; of users it knows."""
        known = [(self._users[owner], events) for owner, events in calls if owner in self._users]
        self._look_up([(user, event.identity) for user, events in known for event in events])

    def save(self) -> None:
        """Write what was inserted, and the heads of users that changed."""
        self._write_rows()
        users = map(self._users.__getitem__, self._unsaved)
        heads = [(user.key, user.head.num_events, user.head.last_seq, user.head.chain) for user in users]
        _execute(
            self._connection,
            "UPDATE users SET num_events = v.column2, last_seq = v.column3, chain = v.column4 FROM ({values}) v"
            " WHERE user_key = v.column1",
            heads,
        )
        self._unsaved.clear()
        self._is_known.clear()
        while len(self._users) > MAX_KNOWN_USERS:
            self._users.popitem(last=False)

    def reset(self) -> None:
        """Forget what was known: the transaction failed."""
        self._users.clear()
        self._unsaved.clear()
        self._rows.clear()
        self._is_known.clear()
        self._seq = None
        self._coming = None
        if self._lateness is not None:
            self._lateness.clear()

    def committed(self) -> None:
        """Note that the transaction is on disk."""
        if self._coming is not None:
            self.ownership, self._coming = self._coming, None

    def own(self, ownership: Ownership) -> None:
        """Write only what `ownership` allows from here on.

        Raises:
            ShardError: it is the first one, and users kept here are others' by it.
        """
        if (self._coming or self.ownership) is None and not_owned(self._connection, ownership, 1):
            raise ShardError(
                f"map: expected all users kept here to be {ownership.name}'s, got others. Make the first map of the "
                "one process that has users, then add those that have none."
            )
        keep_ownership(self._connection, ownership)
        self._coming = ownership

    def keep_page(self, page: Page) -> None:
        """Keep users who come from another log."""
        self.save()
        self._seq = None
        for user in page.users:
            self._users.pop(Owner(user.user_id, user.tenant), None)
        keep_page(self._connection, page, self._salt)

    def let_go(self, owners: Sequence[Owner]) -> None:
        """Take out users who are another log's. Their rows are owed to `purge`."""
        self.save()
        for owner in owners:
            self._users.pop(owner, None)
        let_go(self._connection, owners, self._salt)

    def insert(self, owner: Owner, events: Sequence[NewEvent]) -> AppendResult:
        """Keep events; those known already change nothing. Late are those before the last event of earlier calls."""
        user = self._user(owner)
        before = user.last
        self._look_up([(user, event.identity) for event in events if (user.key, event.identity) not in self._is_known])
        outcomes: list[Outcome] = []
        most_after = 0
        for event in events:
            head = user.head
            if self._is_known[user.key, event.identity]:
                outcomes.append(self._compare(user.key, head.generation, event))
                continue
            if head.num_events >= self._user_events:
                outcomes.append("full")
                continue
            seq, chain = self._insert_event(user.key, head, event)
            head = UserHead(head.generation, head.num_events + 1, seq, chain)
            stored = StoredEvent(seq, event.item_id, event.timestamp, event.event_id, event.event_type, event.value)
            if before is not None and is_late(stored, before, self._tie):
                after = self._events_after(user.key, head, stored)
                most_after = max(most_after, after)
                outcomes.append("late" if self._late_horizon is None or after <= self._late_horizon else "late-far")
            else:
                outcomes.append("accepted")
            goes_last = user.last is None or not is_late(stored, user.last, self._tie)
            user = _User(user.key, head, stored if goes_last else user.last)
            self._change(owner, user)
        return AppendResult(outcomes, user.head, most_after)

    def retract(self, owner: Owner, event_id: str) -> AppendResult:
        """Take an event back: accepted, duplicate (it was already) or unknown."""
        user = self._user(owner)
        found = self._find(user.key, user.head.generation, event_id)
        if found is None:
            return AppendResult(["unknown"], user.head)
        event, live = found
        if not live:
            return AppendResult(["duplicate"], user.head)
        after = self._events_after(user.key, user.head, event)
        return AppendResult(["accepted"], self._bury(owner, user, event, b"i" + event_id.encode()), after)

    def correct(self, owner: Owner, event: NewEvent) -> AppendResult:
        """Put an event in the place of the one that has its id; kept as new where none has."""
        assert event.event_id is not None
        user = self._user(owner)
        found = self._find(user.key, user.head.generation, event.event_id)
        if found is None:
            return self.insert(owner, [event])
        old, live = found
        if live and old.has_payload(event):
            return AppendResult(["duplicate"], user.head)
        if not live and user.head.num_events >= self._user_events:
            return AppendResult(["full"], user.head)
        freed = b"x" + old.seq.to_bytes(8, "big")
        after = self._events_after(user.key, user.head, old)
        if live:
            self._bury(owner, user, old, freed)
        else:
            self._connection.execute("UPDATE events SET identity = ? WHERE seq = ?", (freed, old.seq))
        self._is_known.pop((user.key, event.identity), None)
        inserted = self.insert(owner, [event])
        return replace(inserted, events_after=max(after, inserted.events_after))

    def forget(self, owner: Owner) -> int:
        """Start a user's next generation; return how many events the last one had. Their rows are owed to `purge`."""
        self._check_owned(owner)
        self.save()
        self._users.pop(owner, None)
        user = read_user(self._connection, owner.key(self._salt))
        if user is None:
            return 0
        user_key, head = user
        self._connection.execute(
            "UPDATE users SET tenant = NULL, user_id = NULL, generation = generation + 1, num_events = 0,"
            " last_seq = 0, chain = x'' WHERE user_key = ?",
            (user_key,),
        )
        self._connection.execute("INSERT INTO purges VALUES (?) ON CONFLICT DO NOTHING", (user_key,))
        owe_wiping(self._connection)
        return head.num_events

    def purge(self) -> bool:
        """Overwrite some rows of forgotten users; return whether more may be left."""
        room = PURGE_ROWS
        users = self._connection.execute("SELECT user_key FROM purges LIMIT ?", (room,)).fetchall()
        for (user_key,) in users:
            self._connection.execute(
                "DELETE FROM events WHERE seq IN (SELECT e.seq FROM events e JOIN users u USING (user_key)"
                " WHERE e.user_key = ? AND e.generation < u.generation LIMIT ?)",
                (user_key, room),
            )
            room -= self._connection.changes() + 1
            if room < 0:  # this one may have more
                break
            self._connection.execute("DELETE FROM purges WHERE user_key = ?", (user_key,))
            self._connection.execute("DELETE FROM users WHERE user_key = ? AND length(owner_key) < 16", (user_key,))
        return bool(users)

    def _bury(self, owner: Owner, user: _User, event: StoredEvent, identity: bytes) -> UserHead:
        """Write a tombstone for a live event, wipe its payload, and return the head after it."""
        head = user.head
        chain = chain_after(head.chain, "retract", event.seq)
        tombstone = b"t" + event.seq.to_bytes(8, "big")
        payload = ("", event.timestamp, None, None, None)
        seq = self._insert_row(user.key, head.generation, tombstone, 0, event.seq, *payload, chain)
        self._connection.execute(
            "UPDATE events SET live = 0, item_id = '', event_type = NULL, value = NULL, identity = ? WHERE seq = ?",
            (identity, event.seq),
        )
        head = UserHead(head.generation, head.num_events - 1, seq, chain)
        self._change(owner, _User(user.key, head, self._last(user.key, head)))
        return head

    def _change(self, owner: Owner, user: _User) -> None:
        self._users[owner] = user
        self._unsaved[owner] = None

    def _user(self, owner: Owner) -> _User:
        """Return what is known of a user, who has a row from here on.

        Raises:
            NotOwnerError: the user is another process's.
        """
        self._check_owned(owner)
        known = self._users.get(owner)
        if known is None:
            key = owner.key(self._salt)
            self._connection.execute(
                "INSERT INTO users (owner_key, tenant, user_id) VALUES (?, ?, ?) ON CONFLICT (owner_key) DO UPDATE SET"
                " tenant = excluded.tenant, user_id = excluded.user_id WHERE user_id IS NULL",
                (key, owner.tenant, owner.user_id),
            )
            if (self._coming or self.ownership) is not None and self._connection.changes():  # new here, or here again
                self._connection.execute(
                    "UPDATE users SET generation = max(generation, ?) WHERE owner_key = ?",
                    (generation_elsewhere(self._connection, owner), key),
                )
            user = read_user(self._connection, key)
            assert user is not None
            known = self._users[owner] = _User(*user, self._last(*user))
        self._users.move_to_end(owner)
        return known

    def _check_owned(self, owner: Owner) -> None:
        """Refuse a call that was let in before its user began to move."""
        ownership = self._coming or self.ownership
        if ownership is not None:
            ownership.check(owner.user_id, writing=True)

    def _look_up(self, identities: Sequence[tuple[_User, bytes]]) -> None:
        """Find out which identities users' rows have."""
        if not identities:
            return
        self._write_rows()
        self._is_known |= {(user.key, identity): False for user, identity in identities}
        found = _execute(
            self._connection,
            "SELECT e.user_key, e.identity FROM ({values}) v CROSS JOIN events e"
            " ON e.user_key = v.column1 AND e.generation = v.column2 AND e.identity = v.column3",
            [(user.key, user.head.generation, identity) for user, identity in identities],
        )
        self._is_known |= dict.fromkeys(found, True)

    def _insert_event(self, user_key: int, head: UserHead, event: NewEvent) -> tuple[int, bytes]:
        """Return the sequence number and rolling hash of a new row."""
        payload = (event.item_id, event.timestamp, event.event_id, event.event_type, event.value)
        told = (event.item_id, event.timestamp, event.event_type, event.value)
        chain = chain_after(head.chain, event.identity, *told)
        seq = self._insert_row(user_key, head.generation, event.identity, 1, None, *payload, chain)
        self._is_known[user_key, event.identity] = True
        return seq, chain

    def _insert_row(self, user_key: int, generation: int, identity: bytes, live: int, *rest: Any) -> int:
        """Return the sequence number of a row that is written before anything else is read or changed."""
        if self._seq is None:
            self._seq = highest_seq(self._connection)
        seq = self._seq = self._seq + 1
        *told, chain = rest
        self._rows.append((seq, user_key, generation, identity, live, *told, int(self._clock()), chain))
        return seq

    def _write_rows(self) -> None:
        _execute(
            self._connection,
            "INSERT INTO events (seq, user_key, generation, identity, live, retracts, item_id, timestamp, event_id,"
            " event_type, value, received, chain) SELECT * FROM ({values}) WHERE column1 IS NOT NULL",
            self._rows,
        )
        self._rows.clear()

    def _compare(self, user_key: int, generation: int, event: NewEvent) -> Outcome:
        """Return what an event is whose identity the log already has."""
        if event.event_id is None:
            return "duplicate"
        found = self._find(user_key, generation, event.event_id)
        assert found is not None
        old, live = found
        return "duplicate" if not live or old.has_payload(event) else "conflict"

    def _events_after(self, user_key: int, head: UserHead, event: StoredEvent) -> int:
        if self._lateness is None:
            return 0
        return self._lateness.events_after(user_key, head, event.timestamp, self._write_rows)

    def _find(self, user_key: int, generation: int, event_id: str) -> tuple[StoredEvent, bool] | None:
        """Return the event of this id and whether it is live."""
        self._write_rows()
        row = self._connection.execute(
            f"SELECT live, {COLUMNS} FROM events WHERE user_key = ? AND generation = ? AND identity = ?",
            (user_key, generation, b"i" + event_id.encode()),
        ).fetchone()
        return None if row is None else (stored_event(row[1:]), bool(row[0]))

    def _last(self, user_key: int, head: UserHead) -> StoredEvent | None:
        """Return the last live event in the one order."""
        if not head.num_events:
            return None
        self._write_rows()
        rows = self._connection.execute(
            f"SELECT {COLUMNS} FROM events WHERE user_key = ?1 AND generation = ?2 AND live = 1 AND timestamp ="
            " (SELECT max(timestamp) FROM events WHERE user_key = ?1 AND generation = ?2 AND live = 1)",
            (user_key, head.generation),
        ).fetchall()
        return max(map(stored_event, rows), key=lambda event: event.order(self._tie))


def _execute(connection: apsw.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return what `statement` finds with `{values}` for rows of one width.

    They are filled up with NULL to a power of two: so few texts of it are made that all stay prepared.
    """
    found: list[Any] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        size, width = 1 << (len(some) - 1).bit_length(), len(some[0])
        given = (*joined.from_iterable(some), *[None] * (width * (size - len(some))))
        found += connection.execute(_with_values(statement, size, width), given).fetchall()
    return found


@cache
def _with_values(statement: str, size: int, width: int) -> str:
    values = "VALUES " + ", ".join(["(" + ", ".join("?" * width) + ")"] * size)
    return statement.format(values=values)
