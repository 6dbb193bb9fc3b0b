"""Events from a log of messages (Kafka's, or one like it) into the service, without losing or doubling one.

A message's key is the user id, its value one event as `POST /v1/users/{id}/events` takes it. What holds:

- *Committed after kept.* A position is committed once the service has acknowledged everything before it: on disk. A
  crash in between has messages delivered again, and the service knows them by their ids, or their content.
- *Order.* A user's events go to the service in the order of their partition.
- *Nothing stalls.* What no service will ever keep goes to `dead_letters` with the reason, and is committed like the
  rest. What cannot be kept now is tried again until it is.
- *Rebalancing.* A partition that is given to another consumer is taken up from its last committed position; a commit
  that comes too late is refused by the broker, which is right: the new owner delivers those messages again.

Broker transactions are not used: a broker that says "exactly once" would not make it so beyond itself.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ksa_serving.errors import ClientError
from ksa_serving.messages import EventMessage, EventsAnswer

logger = logging.getLogger(__name__)

CALL_EVENTS = 500
"""Events of one user in one call."""


@dataclass(frozen=True)
class SourceMessage:
    """One message of a partition, as bytes."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


class Source(Protocol):
    """A log of messages, read by this consumer's share of its partitions."""

    def poll(self, most: int, seconds: float) -> Sequence[SourceMessage]:
        """Return the next messages, in order within each partition; none after so many seconds."""
        ...

    def commit(self, positions: Mapping[int, int]) -> None:
        """Remember for each partition the offset to go on from. One that was given away is left out."""
        ...

    def close(self) -> None:
        """Let go of the partitions."""
        ...


@dataclass(frozen=True)
class DeadLetter:
    """A message that is not kept, and why: `no-user`, `no-event`, `invalid-event`, or the service's own reason."""

    message: SourceMessage
    reason: str


Keep = Callable[[str, Sequence[EventMessage]], EventsAnswer]
"""Keeps a user's events; returns when they are on disk. `Client.keep`."""


def consume(
    source: Source,
    keep: Keep,
    dead_letters: Callable[[DeadLetter], None],
    stop: Callable[[], bool],
    most: int = 1000,
    wait_seconds: float = 1.0,
) -> Counter[str]:
    """Read until `stop` says so; return how many events came to what.

    Args:
        dead_letters: given what is not kept; returns when that is safe.
        most: messages read at once.
        wait_seconds: between tries where the service is away.
    """
    outcomes: Counter[str] = Counter()
    while not stop():
        messages = source.poll(most, 0.5)
        if not messages:
            continue
        for user_id, given in _by_user(messages, dead_letters, outcomes).items():
            for start in range(0, len(given), CALL_EVENTS):
                part = given[start : start + CALL_EVENTS]
                while not _kept(user_id, part, keep, dead_letters, outcomes):
                    if stop():
                        return outcomes  # nothing of these messages was committed
                    time.sleep(wait_seconds)
        ends: dict[int, int] = {}
        for message in messages:
            ends[message.partition] = max(ends.get(message.partition, 0), message.offset + 1)
        source.commit(ends)
    return outcomes


_Given = list[tuple[SourceMessage, EventMessage]]


def _by_user(
    messages: Sequence[SourceMessage], dead_letters: Callable[[DeadLetter], None], outcomes: Counter[str]
) -> dict[str, _Given]:
    """Return each user's events in order."""
    given: dict[str, _Given] = {}
    for message in messages:
        try:
            user_id = (message.key or b"").decode()
            reason = "no-user" if not user_id else "no-event" if message.value is None else None
            if reason is None and message.value is not None:
                event = msgspec.json.decode(message.value, type=EventMessage)
                given.setdefault(user_id, []).append((message, event))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            reason = "invalid-event"
        if reason is not None:
            dead_letters(DeadLetter(message, reason))
            outcomes[reason] += 1
    return given


def _kept(
    user_id: str, given: _Given, keep: Keep, dead_letters: Callable[[DeadLetter], None], outcomes: Counter[str]
) -> bool:
    """Return whether events are done with; False: the service is away, try again."""
    try:
        answer = keep(user_id, [event for _, event in given])
    except ClientError as error:
        if not error.refused:
            logger.warning("consume: the service cannot keep events now: %s", error)
            return False
        for message, _ in given:
            dead_letters(DeadLetter(message, str(error)))
        outcomes["refused"] += len(given)
        return True
    for (message, _), result in zip(given, answer.results):
        outcomes[result.status] += 1
        if result.status == "rejected":
            dead_letters(DeadLetter(message, result.reason or "rejected"))
    return True
