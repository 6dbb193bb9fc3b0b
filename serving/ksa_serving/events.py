"""Events before and after they are kept, whose they are, and the one order among them.

They are structs and no dataclasses: some of each are made for every call, in an eighth of the time.
"""

import hashlib
from functools import cached_property
from typing import NamedTuple

import msgspec
from msgspec import Struct

from recsys_ksa.order import OrderKey, TieKind, order_key

Order = tuple[OrderKey, int]
"""What a user's events are sorted by: the one order's key, then arrival (the sequence number)."""


class Owner(Struct, frozen=True):
    """Whose events these are. One tenant today; the key has room for more."""

    user_id: str
    tenant: str = ""

    def key(self, salt: bytes) -> bytes:
        """Return 16 bytes that name this owner without telling who it is."""
        named = len(self.tenant.encode()).to_bytes(4, "big") + self.tenant.encode() + self.user_id.encode()
        return hashlib.blake2b(named, digest_size=16, key=salt).digest()


class NewEvent(Struct, frozen=True, dict=True):
    """An event before it is kept. `timestamp` in Unix seconds, 0 <= timestamp < 2^63."""

    item_id: str
    timestamp: int
    event_id: str | None = None
    event_type: str | None = None
    value: float | None = None

    @cached_property
    def identity(self) -> bytes:
        """What makes two sent events the same one."""
        if self.event_id is not None:
            return b"i" + self.event_id.encode()
        same = msgspec.msgpack.encode((self.item_id, self.timestamp, self.event_type))
        return b"c" + hashlib.sha256(same).digest()[:16]


class StoredEvent(Struct, frozen=True):
    """An event of the log. `seq` is its arrival."""

    seq: int
    item_id: str
    timestamp: int
    event_id: str | None
    event_type: str | None
    value: float | None

    def order(self, tie: TieKind) -> Order:
        """Return what this event is sorted by among its user's: the one order, then arrival."""
        key = order_key(
            tie, self.timestamp, self.item_id, event_id=self.event_id, event_type=self.event_type, arrival=self.seq
        )
        return key, self.seq

    def has_payload(self, event: NewEvent) -> bool:
        """Return whether `event`, which has the same id, says the same."""
        mine = (self.item_id, self.timestamp, self.event_type, self.value)
        return mine == (event.item_id, event.timestamp, event.event_type, event.value)


class Meeting(NamedTuple):
    """An event of one item: its index in the history, from 0, and its time."""

    place: int
    timestamp: int


def sort_events(events: list[StoredEvent], tie: TieKind) -> list[StoredEvent]:
    """Return events in the one order. Keys are computed only where timestamps are equal: hash ties are slow."""
    events = sorted(events, key=lambda event: event.timestamp)
    start = 0
    for stop in range(1, len(events) + 1):
        if stop == len(events) or events[stop].timestamp != events[start].timestamp:
            if stop - start > 1:
                events[start:stop] = sorted(events[start:stop], key=lambda event: event.order(tie))
            start = stop
    return events


def chain_after(chain: bytes, *parts: object) -> bytes:
    """Return the rolling hash of a user's log after one more entry, 16 bytes: what was kept, in order of arrival."""
    return hashlib.sha256(chain + msgspec.msgpack.encode(parts)).digest()[:16]


def is_late(event: StoredEvent, last: StoredEvent, tie: TieKind) -> bool:
    """Return whether `event` lies before `last`; ties are computed only where the times are equal."""
    if event.timestamp != last.timestamp:
        return event.timestamp < last.timestamp
    return event.order(tie) < last.order(tie)
