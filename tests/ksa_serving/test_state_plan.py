"""What is to be done is the least: where events follow the last one they are appended, also among equal times."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.testing import toy_release
from ksa_serving.user_states import UserStates

ANN = Owner("ann")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(tmp_path, "id")
    yield log
    log.close()


@pytest.mark.parametrize(
    ("added", "replays"),
    [
        ([("m", 5)], 0),  # by its id after the last of its second
        ([("m", 5), ("a", 6)], 0),
        ([("a", 5)], 1),
        ([("a", 5), ("z", 6)], 1),
        ([("z", 4)], 1),
        ([("a", 6)], 0),
    ],
)
def test_events_of_the_last_ones_second_are_appended_where_they_follow_it(
    log: EventLog, added: list[tuple[str, int]], replays: int
):
    release = toy_release("id")
    states = UserStates(release, log, MemoryStateStore(10**6))
    log.append(ANN, [NewEvent("milk", at, event_id) for event_id, at in (("b", 1), ("c", 5))])
    states.current(ANN)
    log.append(ANN, [NewEvent("tea", at, event_id) for event_id, at in added])
    record, source = states.current(ANN)
    assert (record.num_events, source) == (2 + len(added), "host")
    assert states.replays["late"] == replays
    assert dict(states.rebuilds) == {"absent": 1}
