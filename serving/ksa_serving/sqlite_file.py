"""The event log's SQLite file: version check, schema, durable opening, transactions, and the lock on its directory."""

import contextlib
import fcntl
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import apsw
import msgspec

from ksa_serving.errors import EventLogError
from ksa_serving.shards import Ownership

FIRST_SAFE_SQLITE = (3, 51, 3)
"""SQLite 3.7.0 to 3.51.2 can corrupt a WAL database that two connections write or checkpoint (the WAL-reset bug)."""
APPLICATION_ID = 0x6B736131
FORMAT = 2
CHECKPOINT_PAGES = 4000
"""In the write-ahead log before a commit also carries them over to the file, which takes it some milliseconds: at 1,000
calls a second SQLite's 1,000 pages came four times a second."""
BUSY_MILLISECONDS = 5000
"""How long a connection waits for another one's lock."""
SCHEMA = """
CREATE TABLE users (
    user_key   INTEGER PRIMARY KEY,
    owner_key  BLOB NOT NULL UNIQUE,
    tenant     TEXT,
    user_id    TEXT,
    generation INTEGER NOT NULL DEFAULT 0,
    num_events INTEGER NOT NULL DEFAULT 0,
    last_seq   INTEGER NOT NULL DEFAULT 0,
    chain      BLOB NOT NULL DEFAULT x''
);
CREATE TABLE events (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    user_key   INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    identity   BLOB NOT NULL,
    live       INTEGER NOT NULL DEFAULT 1,
    retracts   INTEGER,
    item_id    TEXT NOT NULL,
    timestamp  INTEGER NOT NULL,
    event_id   TEXT,
    event_type TEXT,
    value      REAL,
    received   INTEGER NOT NULL,
    chain      BLOB NOT NULL
);
CREATE UNIQUE INDEX events_identity ON events (user_key, generation, identity);
CREATE INDEX events_arrival ON events (user_key, generation, seq);
CREATE INDEX events_time ON events (user_key, generation, live, timestamp);
CREATE TABLE purges (user_key INTEGER PRIMARY KEY);
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""
"""`live`: 0 for tombstones and for what they retract. `user_id` is NULL while a user is deleted; `owner_key`, a salted
hash, finds the generation again; a shorter one is that of a user who moved to another log and is forgotten when the
rows are. `purges`: users of whom rows of older generations are still to be removed. `facts`: the log's `salt`, the
`ownership`, and what `shard_rows.py` knows of logs from which users came.
"""


def check_sqlite_version(version: str | None = None) -> None:
    """Refuse a SQLite whose WAL mode can corrupt the log.

    Raises:
        EventLogError: older than 3.51.3.
    """
    version = version or apsw.sqlite_lib_version()
    if tuple(int(part) for part in version.split(".")[:3]) < FIRST_SAFE_SQLITE:
        raise EventLogError(
            f"event log: expected SQLite 3.51.3 or newer (3.7.0 to 3.51.2 can corrupt a WAL database), got {version}. "
            "Install apsw 3.54.1 or newer."
        )


@contextlib.contextmanager
def transaction(connection: apsw.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    if connection.in_transaction:  # the last one failed, and could not be undone either
        connection.execute("ROLLBACK")
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def connect(path: Path, flags: int) -> apsw.Connection:
    connection = apsw.Connection(str(path), flags=flags)
    connection.set_busy_timeout(BUSY_MILLISECONDS)
    return connection


def open_writer(path: Path) -> apsw.Connection:
    """Open the writing connection, the schema made if the file is new, durability set and checked."""
    connection = connect(path, apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
    try:
        _make_durable(connection, path)
        with transaction(connection):
            _make_schema(connection, path)
    except BaseException:
        connection.close(force=True)
        raise
    return connection


def _make_durable(connection: apsw.Connection, path: Path) -> None:
    mode = connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "FULL")
    connection.pragma("secure_delete", "ON")  # what is deleted is overwritten
    connection.pragma("wal_autocheckpoint", CHECKPOINT_PAGES)
    if mode != "wal" or connection.pragma("synchronous") != 2:
        raise EventLogError(f"{path}: expected WAL mode and synchronous=FULL, got {mode}. Use a local file system.")


def _make_schema(connection: apsw.Connection, path: Path) -> None:
    application, version = connection.pragma("application_id"), connection.pragma("user_version")
    if (application, version) == (0, 0) and not connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
        connection.execute(SCHEMA)
        connection.execute("INSERT INTO facts VALUES ('salt', ?)", (secrets.token_bytes(16),))
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", FORMAT)
    elif (application, version) != (APPLICATION_ID, FORMAT):
        raise EventLogError(f"{path}: expected an event log of format {FORMAT}, got another file. Check --state-dir.")


def salt_of(connection: apsw.Connection) -> bytes:
    """Return the log's own random bytes, with which owners are hashed."""
    row = connection.execute("SELECT value FROM facts WHERE name = 'salt'").fetchone()
    if row is None or not isinstance(row[0], bytes):
        raise EventLogError("event log: expected its salt, got none: damaged.")
    return row[0]


def ownership_of(connection: apsw.Connection) -> Ownership | None:
    """Return whose users this log is for; None: everyone's."""
    row = connection.execute("SELECT value FROM facts WHERE name = 'ownership'").fetchone()
    return None if row is None else msgspec.json.decode(row[0], type=Ownership)


def keep_ownership(connection: apsw.Connection, ownership: Ownership) -> None:
    """Keep whose users this log is for."""
    row = ("ownership", msgspec.json.encode(ownership))
    connection.execute("INSERT INTO facts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", row)


def lock_directory(directory: Path) -> IO[str]:
    """Hold `directory` for this process until the file is closed; the kernel lets go when the process dies."""
    try:
        file = open(directory / "lock", "w")  # noqa: SIM115 - held until close
    except OSError as error:
        raise EventLogError(f"{directory}: expected a directory to write in, got: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise EventLogError(
            f"{directory}: expected to be its only user, but another process serves from it. Stop that one."
        ) from None
    return file
