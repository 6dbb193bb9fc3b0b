"""Messages into the log: delivered again, cut off between keeping and committing, moved elsewhere, poisoned."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksa_serving.consumption import DeadLetter, SourceMessage, consume
from ksa_serving.errors import ClientError
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.messages import EventMessage, EventResult, EventsAnswer

PARTITIONS = 3


class Crash(Exception):
    pass


class Topic:
    """Partitions in memory with the group's committed positions; users are spread over partitions by their name."""

    def __init__(self) -> None:
        self.messages: list[list[SourceMessage]] = [[] for _ in range(PARTITIONS)]
        self.committed = [0] * PARTITIONS

    def send(self, user: str, event: object) -> None:
        partition = sum(user.encode()) % PARTITIONS
        value = event if isinstance(event, bytes | None) else json.dumps(event).encode()
        offset = len(self.messages[partition])
        self.messages[partition].append(SourceMessage(partition, offset, user.encode(), value))

    @property
    def drained(self) -> bool:
        return self.committed == [len(messages) for messages in self.messages]


class Consumer:
    """Reads from the committed positions on, a few at a time; crashes, and loses partitions, when told to."""

    def __init__(self, topic: Topic, draw: random.Random, crashes: float = 0.0, loses: float = 0.0):
        self.topic, self.draw, self.crashes, self.loses = topic, draw, crashes, loses
        self.at = list(topic.committed)

    def poll(self, most: int, seconds: float) -> Sequence[SourceMessage]:
        found: list[SourceMessage] = []
        for partition, messages in enumerate(self.topic.messages):
            take = messages[self.at[partition] :][: self.draw.randint(0, 4)]
            self.at[partition] += len(take)
            found += take
        return found

    def commit(self, positions: Mapping[int, int]) -> None:
        if self.draw.random() < self.crashes:
            raise Crash
        for partition, offset in positions.items():
            if self.draw.random() < self.loses:  # given to another, who will deliver these again
                self.at[partition] = self.topic.committed[partition]
            else:
                self.topic.committed[partition] = offset

    def close(self) -> None:
        pass


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(tmp_path, "arrival")
    yield log
    log.close()


def keeper(log: EventLog) -> Callable[[str, Sequence[EventMessage]], EventsAnswer]:
    def keep(user: str, events: Sequence[EventMessage]) -> EventsAnswer:
        if user == "refused":
            raise ClientError("400 invalid-user-id", refused=True)
        made = [NewEvent(e.item_id, e.timestamp, e.event_id, e.event_type, e.value) for e in events]
        outcomes = log.append(Owner(user), made).outcomes
        words = {"late": "late-applied", "conflict": "rejected"}
        return EventsAnswer([EventResult(words.get(outcome, outcome)) for outcome in outcomes], 0)  # type: ignore[arg-type]

    return keep


def read_all(
    topic: Topic, log: EventLog, draw: random.Random, **faults: float
) -> tuple[Counter[str], list[DeadLetter]]:
    """Start consumers, one after the other dies, until everything is committed."""
    outcomes: Counter[str] = Counter()
    letters: list[DeadLetter] = []
    while not topic.drained:
        consumer = Consumer(topic, draw, **faults)
        try:
            outcomes += consume(consumer, keeper(log), letters.append, lambda: topic.drained)
        except Crash:
            continue
    return outcomes, letters


@given(seed=st.integers(0, 2**31), crashes=st.sampled_from([0.0, 0.3]), loses=st.sampled_from([0.0, 0.3]))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_event_is_kept_once_whatever_is_delivered_again(
    seed: int, crashes: float, loses: float, tmp_path_factory
):
    draw, topic = random.Random(seed), Topic()
    log = EventLog(tmp_path_factory.mktemp("log"), "arrival")
    sent: dict[str, list[str]] = {}
    for n in range(draw.randint(1, 60)):
        user = f"u{draw.randrange(5)}"
        event = {"item_id": f"i{n}", "timestamp": 1000 + n}
        if draw.random() < 0.5:
            event["event_id"] = f"e{n}"
        topic.send(user, event)
        sent.setdefault(user, []).append(f"i{n}")
    read_all(topic, log, draw, crashes=crashes, loses=loses)
    for user, items in sent.items():
        assert [event.item_id for event in log.read(Owner(user))[1]] == items  # once each, in the partition's order
    log.close()


def test_what_can_never_be_kept_is_put_aside_with_its_reason_and_stalls_nothing(log: EventLog):
    topic = Topic()
    good = {"item_id": "a", "timestamp": 5, "event_id": "1"}
    for user, event in (
        ("", good),
        ("ann", None),
        ("ann", b"\xff\xfe"),
        ("ann", b'{"item_id": 7}'),
        ("ann", b"[" * 100_000),
        ("refused", good),
        ("ann", good),
        ("ann", {**good, "item_id": "other"}),
        ("ann", {**good, "surprise": 1}),
        ("ann", {"item_id": "b", "timestamp": 6}),
    ):
        topic.send(user, event)
    outcomes, letters = read_all(topic, log, random.Random(0))
    assert [event.item_id for event in log.read(Owner("ann"))[1]] == ["a", "b"]
    assert Counter(letter.reason for letter in letters) == {
        "no-user": 1,
        "no-event": 1,
        "invalid-event": 4,
        "400 invalid-user-id": 1,
        "rejected": 1,
    }
    assert outcomes["accepted"] == 2


def test_a_service_that_is_away_is_waited_for_and_nothing_is_committed_meanwhile(log: EventLog):
    topic, away = Topic(), [3]
    topic.send("ann", {"item_id": "a", "timestamp": 5})
    keep = keeper(log)

    def sometimes(user: str, events: Sequence[EventMessage]) -> EventsAnswer:
        if away[0]:
            away[0] -= 1
            assert not topic.drained
            raise ClientError("503")
        return keep(user, events)

    letters: list[DeadLetter] = []
    consumer = Consumer(topic, random.Random(1))
    outcomes = consume(consumer, sometimes, letters.append, lambda: topic.drained, wait_seconds=0.001)
    assert (dict(outcomes), letters) == ({"accepted": 1}, [])


def test_stopping_while_the_service_is_away_commits_nothing(log: EventLog):
    topic = Topic()
    topic.send("ann", {"item_id": "a", "timestamp": 5})
    calls: list[str] = []

    def never(user: str, events: Sequence[EventMessage]) -> EventsAnswer:
        calls.append(user)
        raise ClientError("503")

    consume(Consumer(topic, random.Random(1)), never, [].append, lambda: len(calls) > 2, wait_seconds=0.001)
    assert topic.committed == [0] * PARTITIONS
