"""How far back a late event lies is told nearly, and without counting."""

import random
from pathlib import Path

import pytest

from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.lateness import STEPS

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
