"""How far back a late event lies is told nearly, and without counting."""

import random
from pathlib import Path

import apsw
import pytest

from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.lateness import STEPS, Lateness
from ksa_serving.user_view import UserHead

ANN = Owner("ann")


@pytest.mark.parametrize("horizon", [5, 31, 160])
def test_how_far_back_an_event_lies_is_nearly_as_counted(tmp_path: Path, seed: int, horizon: int):
    draw = random.Random(seed)
    log = EventLog(tmp_path, "arrival", late_horizon=horizon)
    error = 0 if horizon < 2 * STEPS else 2 * (horizon // STEPS)
    times: list[int] = []
    for number in range(400):
        at = draw.randrange(10 * number + 1)
        late = any(time > at for time in times)
        result = log.append(ANN, [NewEvent(f"item-{number}", at)])
        times.append(at)
        count = sum(time > at for time in times)
        assert (result.outcomes != ["accepted"]) == late
        assert abs(result.events_after - min(horizon + 1, count)) <= error
        if abs(count - horizon - 0.5) > error:
            assert (result.outcomes == ["late-far"]) == (count > horizon)
    log.close()


@pytest.fixture
def connection(tmp_path: Path):
    log = EventLog(tmp_path, "arrival")
    log.append(ANN, [NewEvent(f"item-{n}", n) for n in range(100)])
    with log._reader() as connection:
        yield connection
    log.close()


def test_times_are_read_again_once_a_sixteenth_of_the_horizon_changed(connection: apsw.Connection):
    lateness, reads = Lateness(connection, 160), list[tuple[int, int]]()

    def ask(num_events: int, generation: int = 0) -> int:
        head = UserHead(generation, num_events)
        return lateness.events_after(1, head, 49, lambda: reads.append((num_events, generation)))

    for num_events in (100, 109, 91, 100, 110, 101, 119, 100):
        assert abs(ask(num_events) - 50) <= 10
    assert reads == [(100, 0), (110, 0), (100, 0)]
    assert ask(100, generation=1) == 0  # a user who was deleted has no events
    assert reads[3:] == [(100, 1)]
    lateness.clear()  # what was read may have been undone
    ask(100)
    ask(100)
    assert reads[4:] == [(100, 0)]


def test_the_times_of_the_last_users_who_sent_late_events_are_kept(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ksa_serving.lateness.MAX_USERS", 2)
    lateness, reads = Lateness(connection, 160), list[int]()
    for user_key in (1, 2, 1, 3, 1, 3, 2):
        lateness.events_after(user_key, UserHead(0, 100), 49, lambda user_key=user_key: reads.append(user_key))
    assert reads == [1, 2, 3, 2]


def test_without_a_horizon_nobody_counts(tmp_path: Path):
    log = EventLog(tmp_path, "arrival")
    log.append(ANN, [NewEvent("a", 5, "e5"), NewEvent("b", 9)])
    result = log.append(ANN, [NewEvent("c", 1)])
    assert (result.outcomes, result.events_after) == (["late"], 0)
    assert log.retract(ANN, "e5").result().events_after == 0
    log.close()


def test_of_a_call_the_earliest_event_counts_and_so_it_does_where_events_change(tmp_path: Path):
    log = EventLog(tmp_path, "arrival", late_horizon=20)
    log.append(ANN, [NewEvent(f"item-{n}", n, f"e{n}") for n in range(10)])
    assert log.append(ANN, [NewEvent("a", 8), NewEvent("b", 3), NewEvent("c", 99)]).events_after == 7
    assert log.correct(ANN, NewEvent("x", 100, "e4")).result().events_after == 7
    assert log.correct(ANN, NewEvent("x", 2, "e4")).result().events_after in (9, 10)  # nearly
    assert log.retract(ANN, "e0").result().events_after == 12
    assert log.retract(ANN, "e0").result().events_after == 0  # nothing changed
    log.close()


def test_one_user_keeps_so_many_events_and_no_more(tmp_path: Path):
    log = EventLog(tmp_path, "arrival", user_events=3)
    events = [NewEvent("milk", n, f"e{n}") for n in range(5)]
    assert log.append(ANN, events[:4]).outcomes == ["accepted"] * 3 + ["full"]
    assert log.append(ANN, events[2:]).outcomes == ["duplicate", "full", "full"]
    assert log.append(Owner("bob"), events[:1]).outcomes == ["accepted"]
    assert log.correct(ANN, NewEvent("bread", 9, "e1")).result().outcomes == ["accepted"]  # in the other's place
    assert log.correct(ANN, events[3]).result().outcomes == ["full"]
    assert log.retract(ANN, "e0").result().outcomes == ["accepted"]
    assert log.append(ANN, events[3:]).outcomes == ["late", "full"]
    assert log.correct(ANN, events[0]).result().outcomes == ["full"]
    assert log.append(ANN, events[:1]).outcomes == ["duplicate"]  # a retracted id stays known
    assert log.head(ANN).num_events == 3
    log.check()
    log.forget(ANN).result()
    assert log.append(ANN, events[:1]).outcomes == ["accepted"]
    log.close()
