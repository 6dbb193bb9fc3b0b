import contextlib
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import apsw
import pytest
from faulty_disk import FaultyVfs, faulty_disks
from hand_driven import done, hand_driven_logs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ksa_serving.errors import EventLogError, OverloadedError
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner, StoredEvent, sort_events
from ksa_serving.sqlite_file import check_sqlite_version, transaction
from ksa_serving.user_view import UserHead
from recsys_ksa.order import TieKind, order_key

ANN, BOB = Owner("ann"), Owner("bob")
TIES: list[TieKind] = ["id", "arrival", "hash"]

events = st.builds(
    NewEvent,
    item_id=st.sampled_from("abc"),
    timestamp=st.integers(0, 4),
    event_id=st.one_of(st.none(), st.sampled_from(["1", "2", "3", "4"])),
    event_type=st.sampled_from([None, "view", "buy"]),
    value=st.sampled_from([None, 1.5]),
)
calls = st.lists(st.tuples(st.sampled_from([ANN, BOB]), st.lists(events, max_size=5)), max_size=8)


@dataclass
class ListLog:
    """What the event log promises, written down as lists."""

    tie: TieKind
    kept: dict[Owner, list[tuple[tuple, NewEvent]]] = field(default_factory=dict)
    arrivals: "itertools.count[int]" = field(default_factory=itertools.count)

    def append(self, owner: Owner, given: list[NewEvent]) -> list[str]:
        kept = self.kept.setdefault(owner, [])
        last = max((order for order, _ in kept), default=None)
        return [self._append_one(kept, event, last) for event in given]

    def _append_one(self, kept: list[tuple[tuple, NewEvent]], event: NewEvent, last: tuple | None) -> str:
        for _, other in kept:
            if event.event_id is not None and other.event_id == event.event_id:
                return "duplicate" if other == event else "conflict"
            same = (other.item_id, other.timestamp, other.event_type) == (
                event.item_id,
                event.timestamp,
                event.event_type,
            )
            if event.event_id is None and other.event_id is None and same:
                return "duplicate"
        arrival = next(self.arrivals)
        key = order_key(
            self.tie,
            event.timestamp,
            event.item_id,
            event_id=event.event_id,
            event_type=event.event_type,
            arrival=arrival,
        )
        kept.append(((key, arrival), event))
        return "late" if last is not None and (key, arrival) < last else "accepted"

    def read(self, owner: Owner) -> list[NewEvent]:
        return [event for _, event in sorted(self.kept.get(owner, []), key=lambda pair: pair[0])]


def contents(stored: list[StoredEvent]) -> list[NewEvent]:
    return [NewEvent(e.item_id, e.timestamp, e.event_id, e.event_type, e.value) for e in stored]


@pytest.mark.parametrize("tie", TIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=calls)
def test_log_equals_a_list(tie: TieKind, calls: list[tuple[Owner, list[NewEvent]]]):
    model = ListLog(tie)
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder), tie)
        seqs = [0]
        for owner, given_events in calls:
            result = log.append(owner, given_events)
            assert result.outcomes == model.append(owner, given_events)
            assert result.head == log.head(owner)
            if "accepted" in result.outcomes or "late" in result.outcomes:
                assert result.head.last_seq > max(seqs)
                seqs.append(result.head.last_seq)
        log.close()
        log = EventLog(Path(folder), tie)  # what was acknowledged is there after a restart, in the one order
        for owner in (ANN, BOB):
            head, stored = log.read(owner)
            assert contents(stored) == model.read(owner)
            assert head.num_events == len(stored)
            assert head.last_seq == max([0, *(event.seq for event in stored)])
            assert len({event.seq for event in stored}) == len(stored)
        log.close()


@pytest.mark.parametrize("tie", TIES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(given_events=st.lists(events, max_size=12))
def test_sorting_equals_sorting_by_every_key(tie: TieKind, given_events: list[NewEvent]):
    stored = [
        StoredEvent(seq, e.item_id, e.timestamp, e.event_id, e.event_type, e.value)
        for seq, e in enumerate(given_events, start=1)
    ]
    assert sort_events(stored, tie) == sorted(stored, key=lambda event: event.order(tie))


@pytest.fixture
def log(tmp_path: Path):
    log = EventLog(tmp_path, "arrival")
    yield log
    log.close()


def test_reading_after_a_sequence_number_gives_what_came_later(log: EventLog):
    log.append(ANN, [NewEvent("a", 5)])
    seq = log.head(ANN).last_seq
    log.append(BOB, [NewEvent("z", 1)])
    log.append(ANN, [NewEvent("b", 9), NewEvent("c", 3)])
    with log.view(ANN) as view:
        assert [event.item_id for event in view.changes(seq).added] == ["c", "b"]
        assert view.head.num_events == 3


def test_unknown_user_has_an_empty_head_and_no_row(log: EventLog):
    assert log.read(ANN) == (UserHead(0, 0, 0, b""), [])
    with log.view(ANN) as view:
        assert view.known([NewEvent("a", 1)], 10) == [False]
    assert log.counts() == (0, 0)


def test_known_looks_no_further_than_asked(log: EventLog):
    first = log.append(ANN, [NewEvent("a", 1)]).head.last_seq
    log.append(ANN, [NewEvent("b", 2)])
    with log.view(ANN) as view:
        known = view.known([NewEvent("a", 1), NewEvent("b", 2), NewEvent("c", 3)], first)
    assert known == [True, False, False]


def test_every_answer_tells_the_head_that_the_log_has_then(log: EventLog):
    answers = [
        lambda: log.append(ANN, [NewEvent("a", 1, "e1"), NewEvent("b", 2, "e2")]),
        lambda: log.append(ANN, [NewEvent("a", 1, "e1")]),
        lambda: log.correct(ANN, NewEvent("c", 3, "e1")).result(),
        lambda: log.correct(ANN, NewEvent("c", 3, "e1")).result(),
        lambda: log.retract(ANN, "e2").result(),
        lambda: log.retract(ANN, "e2").result(),
        lambda: log.retract(ANN, "e9").result(),
        lambda: log.correct(ANN, NewEvent("d", 4, "e2")).result(),
    ]
    assert [(answer().head == log.head(ANN), log.head(ANN).num_events) for answer in answers] == [
        (True, num_events) for num_events in (2, 2, 2, 2, 1, 1, 1, 2)
    ]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EventLogError, match="expected a directory to write in"):
        EventLog(tmp_path / "file", "arrival")


def test_tenants_are_apart(log: EventLog):
    log.append(Owner("ann", "shop"), [NewEvent("a", 1)])
    assert log.head(ANN).num_events == 0


def test_waiting_calls_share_a_transaction_and_each_gets_its_own_result(log: EventLog):
    futures: list[Future] = [log.submit(Owner(f"u{n % 7}"), [NewEvent(f"i{n}", n)]) for n in range(300)]
    assert all(future.result().outcomes == ["accepted"] for future in futures)
    assert log.counts() == (7, 300)


changes = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "correct", "retract", "forget"]),
        st.sampled_from([ANN, BOB]),
        st.lists(events, min_size=1, max_size=5),
        st.sampled_from(["1", "2", "3", "4"]),
    ),
    max_size=12,
)


def ask_for(log: EventLog, change: tuple[str, Owner, list[NewEvent], str]) -> Future:
    kind, owner, given, event_id = change
    if kind == "append":
        return log.submit(owner, given)
    if kind == "correct":
        return log.correct(owner, replace(given[0], event_id=event_id))
    return log.retract(owner, event_id) if kind == "retract" else log.forget(owner)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=changes)
def test_calls_of_one_transaction_are_as_those_of_many(changes: list[tuple[str, Owner, list[NewEvent], str]]):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        alone = EventLog(Path(one), "id", late_horizon=2, clock=lambda: 9.0)
        grouped = EventLog(Path(other), "id", late_horizon=2, clock=lambda: 9.0)
        expected = [ask_for(alone, change).result() for change in changes]
        with blocked(Path(other)):
            futures = [ask_for(grouped, change) for change in changes]
        assert [future.result() for future in futures] == expected
        for owner in (ANN, BOB):
            assert grouped.read(owner) == alone.read(owner)
        alone.close()
        grouped.close()


def test_a_transaction_of_many_calls_takes_few_statements(log: EventLog, tmp_path: Path):
    for name in ("u0", "u1"):
        log.append(Owner(name), [NewEvent("known", 1)])
    statements: list[str] = []
    log._connection.exec_trace = lambda cursor, statement, bindings: statements.append(statement) or True
    with blocked(tmp_path):
        futures = [log.submit(Owner(f"u{n % 2}"), [NewEvent(f"i{n}", n + 1)]) for n in range(100)]
    assert all(future.result().outcomes == ["accepted"] for future in futures)
    assert (
        sum(statement.startswith("INSERT INTO events") for statement in statements) <= 14
    )  # powers of two, in two transactions
    assert len(statements) <= 2 * 5


@contextlib.contextmanager
def blocked(directory: Path) -> Iterator[None]:
    """Make calls wait for one transaction together."""
    blocker = apsw.Connection(str(directory / "events.sqlite"))
    blocker.execute("BEGIN IMMEDIATE")
    yield
    blocker.execute("ROLLBACK")
    blocker.close()


def test_a_call_that_cannot_be_written_does_not_fail_its_neighbours(log: EventLog):
    poison = NewEvent("\ud800", 1)  # no UTF-8
    futures = [log.submit(ANN, [event]) for event in (NewEvent("a", 1), poison, NewEvent("b", 2))]
    assert futures[0].result().outcomes == ["accepted"]
    with pytest.raises(EventLogError, match="Nothing of this call was kept"):
        futures[1].result()
    assert futures[2].result().outcomes == ["accepted"]
    assert [event.item_id for event in log.read(ANN)[1]] == ["a", "b"]
    assert log.writer.healthy


def test_a_failed_call_keeps_nothing_of_itself(log: EventLog):
    with pytest.raises(EventLogError):
        log.append(ANN, [NewEvent("a", 1), NewEvent("\ud800", 2)])
    assert log.read(ANN) == (UserHead(), [])


def test_a_disk_that_cannot_be_written_is_told_and_recovers(log: EventLog):
    limit = log._connection.pragma("max_page_count", 1)  # the file may not grow
    with pytest.raises(EventLogError, match="full"):
        log.append(ANN, [NewEvent("x" * 200, n) for n in range(1000)])
    assert not log.writer.healthy
    kept = log.head(ANN).num_events
    log._connection.pragma("max_page_count", 1_000_000)
    log.writer.probe()
    assert log.append(ANN, [NewEvent("after", 10**6)]).outcomes == ["accepted"]
    assert log.writer.healthy
    assert log.head(ANN).num_events == kept + 1
    assert limit


def test_too_many_waiting_calls_are_refused(tmp_path: Path):
    log = EventLog(tmp_path, "arrival", waiting_calls=2)
    blocker = apsw.Connection(str(tmp_path / "events.sqlite"))
    blocker.execute("BEGIN IMMEDIATE")  # the writer waits for this lock
    futures = []
    with pytest.raises(OverloadedError):  # noqa: PT012 - one of them is refused, as soon as the queue is full
        for n in range(10):
            futures.append(log.submit(ANN, [NewEvent("a", n)]))
    blocker.execute("ROLLBACK")
    blocker.close()
    assert all(future.result().outcomes == ["accepted"] for future in futures)
    log.close()


def test_closing_writes_what_waits_and_refuses_what_comes(tmp_path: Path):
    log = EventLog(tmp_path, "arrival")
    futures = [log.submit(ANN, [NewEvent("a", n)]) for n in range(50)]
    log.close()
    log.close()
    assert all(future.result().outcomes == ["accepted"] for future in futures)
    with pytest.raises(EventLogError, match="closed"):
        log.submit(ANN, [NewEvent("a", 99)])


def test_a_cancelled_call_is_written_whole_or_not_at_all(log: EventLog):
    futures = [log.submit(ANN, [NewEvent("a", n), NewEvent("b", n)]) for n in range(50)]
    cancelled = [future.cancel() for future in futures]
    done = sum(1 for future, gone in zip(futures, cancelled) if not gone and future.result())
    assert log.head(ANN).num_events == 2 * done


def test_another_process_is_refused(log: EventLog, tmp_path: Path):
    code = (
        f"from ksa_serving.event_log import EventLog; from pathlib import Path; EventLog(Path({str(tmp_path)!r}), 'id')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process serves from it" in process.stderr


def test_another_file_is_refused(tmp_path: Path):
    (tmp_path / "events.sqlite").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(EventLogError, match="expected an event log"):
        EventLog(tmp_path, "arrival")
    (tmp_path / "events.sqlite").unlink()
    with apsw.Connection(str(tmp_path / "events.sqlite")) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(EventLogError, match="another"):
        EventLog(tmp_path, "arrival")


@pytest.mark.parametrize("version", ["3.7.0", "3.40.1", "3.51.2"])
def test_sqlite_with_the_wal_reset_bug_is_refused(version: str):
    with pytest.raises(EventLogError, match=version):
        check_sqlite_version(version)


@pytest.mark.parametrize("version", ["3.51.3", "3.54.1", "4.0.0"])
def test_sqlite_without_it_is_taken(version: str):
    check_sqlite_version(version)


def test_a_log_is_not_opened_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("apsw.sqlite_lib_version", lambda: "3.51.2")
    with pytest.raises(EventLogError, match=r"3\.51\.2"):
        EventLog(tmp_path, "arrival")
    assert not list(tmp_path.iterdir())


def test_durability_is_what_it_says(log: EventLog):
    assert log._connection.pragma("journal_mode") == "wal"
    assert log._connection.pragma("synchronous") == 2


def test_a_forgotten_user_starts_anew_and_leaves_no_bytes(tmp_path: Path):
    log = EventLog(tmp_path, "arrival")
    log.append(ANN, [NewEvent(f"secret-{n}", n, f"id-{n}") for n in range(5000)])
    log.append(BOB, [NewEvent("kept", 1)])
    assert log.forget(ANN).result() == 5000
    assert log.forget(Owner("nobody")).result() == 0
    assert log.read(ANN)[1] == []
    assert log.head(ANN).generation == 1
    assert log.owners() == [BOB]
    assert log.append(ANN, [NewEvent("fresh", 1)]).outcomes == ["accepted"]
    log.close()
    log = EventLog(tmp_path, "arrival")  # what was left of the purge goes on after a restart
    while log.purging:
        time.sleep(0.01)
    assert [event.item_id for event in log.read(ANN)[1]] == ["fresh"]
    for file in tmp_path.iterdir():
        assert b"secret-" not in file.read_bytes(), file
    log.close()


def test_forgotten_rows_leave_the_file_though_the_log_ended_before_it_was_overwritten(tmp_path: Path):
    log = EventLog(tmp_path, "arrival")
    log.append(ANN, [NewEvent(f"secret-{n}", n, f"id-{n}") for n in range(3000)])
    log._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    log._connection.set_busy_timeout(10)
    with log._reader() as connection, transaction(connection, "DEFERRED"):
        assert connection.execute("SELECT count(*) FROM events").get == 3000
        log.forget(ANN).result()
        with log._reader() as other:
            while other.execute("SELECT count(*) FROM purges").get:
                time.sleep(0.01)
        log.close()  # as one that is killed: the rows are overwritten in the write-ahead log alone
    assert b"secret-" in (tmp_path / "events.sqlite").read_bytes()
    log = EventLog(tmp_path, "arrival")
    while log.purging:
        time.sleep(0.01)
    for file in tmp_path.iterdir():
        assert b"secret-" not in file.read_bytes(), file
    log.close()


def test_forgotten_rows_leave_the_write_ahead_log_also_when_someone_still_reads_it(tmp_path: Path):
    log = EventLog(tmp_path, "arrival")
    log.append(ANN, [NewEvent(f"secret-{n}", n, f"id-{n}") for n in range(3000)])
    with log.view(BOB) as view:
        assert view.newest(0) == []
        log._connection.set_busy_timeout(10)
        assert log.forget(ANN).result() == 3000
        time.sleep(0.3)
        assert log.purging  # the reader still needs the old pages
    while log.purging:
        time.sleep(0.01)
    for file in tmp_path.iterdir():
        assert b"secret-" not in file.read_bytes(), file
    log.close()


def test_no_call_waits_for_a_reader_who_keeps_forgotten_rows_from_being_overwritten(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
):
    waited: list[int] = []
    monkeypatch.setattr(FaultyVfs, "xSleep", lambda vfs, microseconds: waited.append(microseconds) or microseconds)
    with faulty_disks(random.Random(seed)), hand_driven_logs(random.Random(seed)):
        log = EventLog(tmp_path, "arrival")
        done(log, log.submit(ANN, [NewEvent("secret", 1)]))
        with log.view(BOB) as view:
            assert view.newest(0) == []
            done(log, log.forget(ANN))
            for _ in range(5):
                log.writer.step()  # overwrites the rows, then tries to empty the write-ahead log
            assert log.purging
            assert done(log, log.submit(BOB, [NewEvent("a", 1)])).outcomes == ["accepted"]
        while log.purging:
            log.writer.step()
        log.close()
    assert waited == []


def test_the_chain_tells_one_log_from_another(tmp_path: Path):
    chains = []
    for name, item in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        log = EventLog(tmp_path / name, "arrival")
        log.append(ANN, [NewEvent(item, 1), NewEvent("z", 2)])
        with log.view(ANN) as view:
            assert view.chain_at(view.head.last_seq) == view.head.chain
            assert view.chain_at(99) is None
            chains.append(view.head.chain)
        log.close()
    assert chains[0] == chains[1] != chains[2]
