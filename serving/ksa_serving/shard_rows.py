"""Users' rows on their way from one event log to another: read by the old owner, kept by the new, then let go.

Everything travels: events, tombstones, event ids, generations, rolling hashes, and the salted hashes of deleted users.
Sequence numbers are those of a log, so entries get new ones: the old owner counts those that move, 1, 2, ..., user by
user, and the new owner adds a *base*, the highest number of either log at the move's begin, above which it sets as many
numbers aside. So an entry's number only rises: who waited for one (`min_seq`) waits for less, and sending a page again
keeps nothing twice. A move raises the highest number by what it moves. (Were the gaps between entries to move too, it
would double now and then, and some ninety moves would fill SQLite's 64 bits.)
"""

import hashlib
import itertools
from collections.abc import Collection, Iterable
from typing import Any

import apsw
import msgspec
from msgspec import Struct

from ksa_serving.errors import ShardError
from ksa_serving.events import Owner
from ksa_serving.page_gaps import owe_wiping
from ksa_serving.shards import Ownership, virtual_shard

PAGE_ROWS = 2000
"""Rows read, sent and kept together; a commit of so many takes some ten milliseconds."""
ENTRY = "seq, identity, live, retracts, item_id, timestamp, event_id, event_type, value, received, chain"


class Entry(Struct, frozen=True, array_like=True):
    """A row of the log, in the columns of `ENTRY`; `seq` and `retracts` count the entries of a move."""

    seq: int
    identity: bytes
    live: int
    retracts: int | None
    item_id: str
    timestamp: int
    event_id: str | None
    event_type: str | None
    value: float | None
    received: int
    chain: bytes


class UserRows(Struct, frozen=True, array_like=True):
    """A user and some of the entries; `last_seq` counts as theirs do."""

    tenant: str
    user_id: str
    generation: int
    num_events: int
    last_seq: int
    chain: bytes
    entries: list[Entry]


class DeletedUser(Struct, frozen=True, array_like=True):
    """What is left of a deleted user: a salted hash, and the generation that would be next."""

    owner_key: bytes
    generation: int


class Cursor(Struct, frozen=True, array_like=True):
    """How far a log was read: users before `user_key` whole, that one's entries up to `seq`; `entries` in all."""

    user_key: int = 0
    seq: int = 0
    entries: int = 0


class Page(Struct, frozen=True):
    """A part of what moves.

    last_seq: highest number of the old owner's log.
    num_entries: that move in all, told with the first page; 0 with others.
    after: where to go on; None: this was the last.
    """

    move: str
    source: str
    last_seq: int
    num_entries: int
    salts: list[bytes]
    deleted: list[DeletedUser]
    users: list[UserRows]
    after: Cursor | None


class Tally(Struct, frozen=True):
    """What a log holds of some virtual shards; equal where users, entries and rolling hashes are."""

    users: int
    entries: int
    digest: str


def read_page(
    connection: apsw.Connection, shards: Collection[int], move: str, source: str, after: Cursor, rows: int = PAGE_ROWS
) -> Page:
    """Return what follows `after` of all users in `shards`, and of all deleted ones: whose they were is not known."""
    salts = _values(connection, "SELECT value FROM facts WHERE name GLOB 'salt*' ORDER BY name")
    num_entries = tally(connection, shards).entries if after == Cursor() else 0
    page = Page(move, source, highest_seq(connection), num_entries, salts, [], [], None)
    room, counted = rows, after.entries
    found: Iterable[Any] = connection.execute(
        "SELECT user_key, owner_key, tenant, user_id, generation, num_events, last_seq, chain FROM users"
        " WHERE user_key >= ? AND length(owner_key) = 16 ORDER BY user_key",
        (after.user_key,),
    )
    for user_key, owner_key, tenant, user_id, generation, num_events, last_seq, chain in found:
        if room <= 0:
            return msgspec.structs.replace(page, after=Cursor(user_key, 0, counted))
        if user_id is None:
            page.deleted.append(DeletedUser(owner_key, generation))
            room -= 1
        elif virtual_shard(user_id) in shards:
            seq = after.seq if user_key == after.user_key else 0
            first = counted - _place(connection, user_key, generation, seq)
            query = f"SELECT {ENTRY} FROM events WHERE user_key = ? AND generation = ? AND seq > ? ORDER BY seq LIMIT ?"
            found_entries: list[Any] = connection.execute(query, (user_key, generation, seq, room)).fetchall()
            entries: list[Entry] = []
            for number, row in enumerate(found_entries, counted + 1):
                entry = Entry(*row)
                retracts = entry.retracts
                if retracts is not None:
                    retracts = first + _place(connection, user_key, generation, retracts)
                entries.append(msgspec.structs.replace(entry, seq=number, retracts=retracts))
            counted += len(entries)
            last = first + _place(connection, user_key, generation, last_seq) if last_seq else 0
            page.users.append(UserRows(tenant, user_id, generation, num_events, last, chain, entries))
            if len(entries) == room:
                return msgspec.structs.replace(page, after=Cursor(user_key, found_entries[-1][0], counted))
            room -= len(entries) + 1
    return page


def keep_page(connection: apsw.Connection, page: Page, salt: bytes) -> None:
    """Keep a page; again, it changes nothing. Inside the writer's transaction.

    Raises:
        ShardError: a user of it has events here already.
    """
    base = _base(connection, page)
    for known in page.salts:
        if known != salt:
            connection.execute("INSERT INTO facts VALUES (?, ?) ON CONFLICT DO NOTHING", (f"salt {known.hex()}", known))
    connection.executemany(
        "INSERT INTO users (owner_key, generation) VALUES (?, ?) ON CONFLICT (owner_key) DO UPDATE SET"
        " generation = excluded.generation WHERE user_id IS NULL AND generation < excluded.generation",
        [(user.owner_key, user.generation) for user in page.deleted],
    )
    for user in page.users:
        user_key, generation = _keep_user(connection, user, base, Owner(user.user_id, user.tenant).key(salt))
        connection.executemany(
            f"INSERT INTO events (user_key, generation, {ENTRY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (seq) DO NOTHING",
            [(user_key, generation, *msgspec.structs.astuple(_renumbered(entry, base))) for entry in user.entries],
        )


def tally(connection: apsw.Connection, shards: Collection[int]) -> Tally:
    """Return what the log holds of all users in `shards`."""
    users = entries = 0
    digests: list[bytes] = []
    found: Iterable[Any] = connection.execute(
        "SELECT user_key, tenant, user_id, generation, num_events, chain FROM users"
    )
    for user_key, tenant, user_id, generation, num_events, chain in found:
        if user_id is None or virtual_shard(user_id) not in shards:
            continue
        query = "SELECT count(*), coalesce(sum(live), 0) FROM events WHERE user_key = ? AND generation = ?"
        rows: Any = connection.execute(query, (user_key, generation)).fetchone()
        users += 1
        entries += rows[0]
        told = msgspec.msgpack.encode((tenant, user_id, num_events, chain, rows))
        digests.append(hashlib.sha256(told).digest())
    return Tally(users, entries, hashlib.sha256(b"".join(sorted(digests))).hexdigest())


def not_owned(connection: apsw.Connection, ownership: Ownership, most: int) -> list[Owner]:
    """Return some users whom `ownership` gives to others."""
    if set(ownership.map.owners) == {ownership.name}:
        return []
    rows = connection.execute("SELECT user_id, tenant FROM users WHERE user_id IS NOT NULL")
    others = (Owner(user_id, tenant) for user_id, tenant in rows if not ownership.owns(user_id))
    return list(itertools.islice(others, most))


def let_go(connection: apsw.Connection, owners: Iterable[Owner], salt: bytes) -> None:
    """Take users out who are another log's now; their rows are owed to `LogEntries.purge`, and nobody finds them."""
    for owner in owners:
        row = connection.execute(
            "UPDATE users SET tenant = NULL, user_id = NULL, generation = generation + 1, num_events = 0,"
            " last_seq = 0, chain = x'', owner_key = CAST(user_key AS BLOB) WHERE owner_key = ? RETURNING user_key",
            (owner.key(salt),),
        ).fetchall()
        connection.executemany("INSERT INTO purges VALUES (?) ON CONFLICT DO NOTHING", row)
        owe_wiping(connection)


def generation_elsewhere(connection: apsw.Connection, owner: Owner) -> int:
    """Return the next generation of a user who was deleted in a log from which users came; 0 for one who was not."""
    salts = _values(connection, "SELECT value FROM facts WHERE name GLOB 'salt *'")
    query = "SELECT generation FROM users WHERE owner_key = ? AND user_id IS NULL"
    return max((generation for salt in salts for generation in _values(connection, query, owner.key(salt))), default=0)


def _base(connection: apsw.Connection, page: Page) -> int:
    """Return what is added to this move's sequence numbers; with the first page, numbers are set aside for them."""
    name = f"base {page.move} {page.source}"
    for kept in _values(connection, "SELECT value FROM facts WHERE name = ?", name):
        return int.from_bytes(kept, "big")
    base = max(highest_seq(connection), page.last_seq)
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'events'")
    connection.execute("INSERT INTO sqlite_sequence VALUES ('events', ?)", (base + page.num_entries,))
    connection.execute("INSERT INTO facts VALUES (?, ?)", (name, base.to_bytes(8, "big")))
    return base


def highest_seq(connection: apsw.Connection) -> int:
    """Return the last sequence number given to an entry, or set aside."""
    return max(_values(connection, "SELECT seq FROM sqlite_sequence WHERE name = 'events'"), default=0)


def _place(connection: apsw.Connection, user_key: int, generation: int, seq: int) -> int:
    """Return how many of a user's entries have numbers up to `seq`."""
    query = "SELECT count(*) FROM events WHERE user_key = ? AND generation = ? AND seq <= ?"
    place: Any = connection.execute(query, (user_key, generation, seq)).get
    return place


def _values(connection: apsw.Connection, query: str, *given: bytes | str) -> list[Any]:
    """Return the one column of a query."""
    return [value for (value,) in connection.execute(query, given)]


def _keep_user(connection: apsw.Connection, user: UserRows, base: int, owner_key: bytes) -> tuple[int, int]:
    """Return the row number and the generation of a user who has a row from here on."""
    last_seq = base + user.last_seq if user.last_seq else 0
    row: Any = connection.execute(
        "INSERT INTO users (owner_key, tenant, user_id, generation, num_events, last_seq, chain)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (owner_key) DO UPDATE SET tenant = excluded.tenant,"
        " user_id = excluded.user_id, generation = max(generation, excluded.generation),"
        " num_events = excluded.num_events, last_seq = excluded.last_seq, chain = excluded.chain"
        " WHERE user_id IS NULL OR (last_seq, chain) = (excluded.last_seq, excluded.chain)"
        " RETURNING user_key, generation",
        (owner_key, user.tenant, user.user_id, user.generation, user.num_events, last_seq, user.chain),
    ).fetchall()
    if not row:
        raise ShardError(
            "move: expected a user that is new here, got one with events of this log. Nothing was changed."
        )
    return row[0]


def _renumbered(entry: Entry, base: int) -> Entry:
    """Return an entry as the new log has it; identities of what was retracted name a sequence number too."""
    seq = base + entry.seq
    retracts = None if entry.retracts is None else base + entry.retracts
    identity = entry.identity
    if retracts is not None:
        identity = b"t" + retracts.to_bytes(8, "big")
    elif identity.startswith(b"x"):
        identity = b"x" + seq.to_bytes(8, "big")
    return msgspec.structs.replace(entry, seq=seq, retracts=retracts, identity=identity)
