"""Rows that were deleted leave no bytes in SQLite's pages, and wiping them changes no row."""

import random
import time
from pathlib import Path

import apsw
import pytest

from ksa_serving import page_gaps
from ksa_serving.errors import EventLogError
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.page_gaps import wipe_gaps


def written_log(path: Path, draw: random.Random, page_size: int) -> apsw.Connection:
    """Keep and delete rows of two tables and an index until pages were split, merged and freed."""
    connection = apsw.Connection(str(path))
    connection.pragma("page_size", page_size)
    connection.pragma("journal_mode", "wal")
    connection.pragma("secure_delete", "ON")
    connection.pragma("synchronous", "OFF")
    connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT, number INTEGER)")
    connection.execute("CREATE INDEX by_number ON rows (number, text)")
    connection.execute("CREATE TABLE words (text TEXT PRIMARY KEY) WITHOUT ROWID")
    for number in range(1500):
        name = draw.choice(["secret", "keeper"])
        text = f"{name}-{number}-" + "x" * draw.choice([0, 0, 20, 300, 2 * page_size])
        connection.execute("INSERT INTO rows VALUES (?, ?, ?)", (draw.randrange(2**60), text, draw.randrange(50)))
        connection.execute("INSERT INTO words VALUES (?)", (text,))
        if draw.random() < 0.3:
            ids = [identity for (identity,) in connection.execute("SELECT id FROM rows")]
            gone = draw.sample(ids, min(3, len(ids)))
            connection.executemany("DELETE FROM rows WHERE id = ?", [(identity,) for identity in gone])
    for table in ("rows", "words"):
        connection.execute(f"DELETE FROM {table} WHERE text LIKE 'secret%'")
    return connection


def wipe(connection: apsw.Connection, at_once: int) -> None:
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    first = 1
    while wipe_gaps(connection, first, at_once):
        first += at_once


@pytest.mark.parametrize("page_size", [512, 4096])
def test_deleted_rows_leave_no_bytes_and_others_stay(tmp_path: Path, seed: int, page_size: int):
    draw, left, turn = random.Random(seed), 0, 0
    while turn < 4 or (not left and turn < 100):  # half of the files keep a deleted row without it
        path = tmp_path / f"{turn}.sqlite"
        connection = written_log(path, draw, page_size)
        tables = [connection.execute(f"SELECT * FROM {table}").fetchall() for table in ("rows", "words")]
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        left += path.read_bytes().count(b"secret")
        wipe(connection, draw.choice([1, 7, 1000]))
        assert b"secret" not in path.read_bytes()
        for number in range(200):  # nor do the connection's own copies of the pages bring them back
            connection.execute("INSERT INTO rows VALUES (?, 'new', ?)", (2**61 + number, number))
        connection.execute("DELETE FROM rows WHERE text = 'new'")
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        assert b"secret" not in path.read_bytes()
        assert connection.pragma("integrity_check") == "ok"
        connection.close()
        again = apsw.Connection(str(path))
        assert tables == [again.execute(f"SELECT * FROM {table}").fetchall() for table in ("rows", "words")]
        again.close()
        turn += 1
    assert left > 0, "SQLite overwrites them itself now"


@pytest.mark.parametrize("ends", [False, True])
def test_a_log_wipes_its_gaps_after_a_deletion_also_where_it_ended_before(
    tmp_path: Path, seed: int, ends: bool, monkeypatch: pytest.MonkeyPatch
):
    draw = random.Random(seed)
    log = EventLog(tmp_path, "arrival")
    for number in range(600):
        owner = Owner(f"u{draw.randrange(20)}")
        rows = [NewEvent(f"item-{number}-{n}", draw.randrange(1000), f"e{number}-{n}") for n in range(9)]
        log.append(owner, rows)
    with monkeypatch.context() as patched:
        patched.setattr("ksa_serving.log_writer.wipe_gaps", lambda connection, first, count: False)
        for number in range(1, 18):
            log.forget(Owner(f"u{number}")).result()
            while log.purging:
                time.sleep(0.001)
    assert not all_wiped(tmp_path / "events.sqlite")
    monkeypatch.setattr("ksa_serving.log_writer.WIPED_AT_ONCE", draw.choice([1, 5, 100]))
    log.forget(Owner("u0")).result()
    if ends:
        log.close()
        log = EventLog(tmp_path, "arrival")
    while log.purging:
        time.sleep(0.001)
    assert all_wiped(tmp_path / "events.sqlite")
    log.check()
    log.close()
    log = EventLog(tmp_path, "arrival")
    assert not log.purging
    log.close()


def all_wiped(path: Path) -> bool:
    """Return whether no page has more in its gap than the pointer to a cell, as the end of wiping itself leaves one."""
    connection = apsw.Connection(str(path))
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    content = path.read_bytes()
    connection.close()
    pages = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    gaps = [page[slice(*page_gaps._gap(page, 0 if at else 100))] for at, page in enumerate(pages)]
    return all(len(gap.strip(b"\0")) <= 2 for gap in gaps)


def test_a_log_too_large_to_be_wiped_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(page_gaps, "MOST_PAGES", 2)
    log = EventLog(tmp_path, "arrival")
    for turn in range(2):
        log.append(Owner("ann"), [NewEvent("milk", turn)])
        log.forget(Owner("ann")).result()
        deadline = time.monotonic() + 60
        while log.purging and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not log.purging
        assert caplog.text.count("expected fewer than 2 pages") == turn + 1
    assert log.append(Owner("bob"), [NewEvent("milk", 1)]).outcomes == ["accepted"]
    log.close()


def test_a_file_whose_pages_cannot_be_told_apart_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    connection = written_log(tmp_path / "log.sqlite", random.Random(0), 512)
    monkeypatch.setattr(page_gaps, "MOST_PAGES", 10)
    with pytest.raises(EventLogError, match="expected fewer than 10 pages"):
        wipe_gaps(connection, 1, 5)
    connection.close()
