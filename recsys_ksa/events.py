"""Events as they are given to a loaded run: checked, and hashed one after the other."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from recsys_ksa.errors import DataError

ItemId = str | int
"""Ids are strings; whole numbers are taken as their decimal digits, as the pipeline does."""
VALUE = "value"
"""The one feature of an event that is given beside its item, time, type and id."""


class Event(NamedTuple):
    """One event; `value` is None where none was given or the run does not look at values."""

    item_id: str
    timestamp: int
    event_type: str | None = None
    event_id: str | None = None
    value: float | None = None


class EventLike(Protocol):
    """What is read of an event, whoever keeps it."""

    @property
    def item_id(self) -> str: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def event_type(self) -> str | None: ...
    @property
    def value(self) -> float | None: ...


def checked_events(
    item_ids: Sequence[ItemId],
    timestamps: Sequence[int],
    event_types: Sequence[str | None] | None,
    event_ids: Sequence[str | None] | None,
    features: Mapping[str, Sequence[object]] | None,
    *,
    reads_value: bool,
) -> list[Event]:
    """Return the events in the order given.

    Args:
        item_ids, timestamps: n of them.
        event_types, event_ids: n of them; None: no event has one.
        features: `value`, n numbers or None, where the run reads values; nothing else.
        reads_value: whether the run does.

    Raises:
        DataError: lengths differ, a value is of the wrong kind, or a feature is none of the run's.
    """
    n = len(item_ids)
    known = (VALUE,) if reads_value else ()
    if unknown := sorted(set(features or ()) - set(known)):
        raise DataError(
            f"features: expected {' or '.join(known) or 'none, as the run reads none'}, got {unknown}. Leave them out."
        )
    values = (features or {}).get(VALUE)
    for name, given in (
        ("timestamps", timestamps),
        ("event_types", event_types),
        ("event_ids", event_ids),
        ("values", values),
    ):
        if given is not None and len(given) != n:
            raise DataError(f"append: expected {n} {name}, one an item id, got {len(given)}.")
    nothing = [None] * n
    events: list[Event] = []
    for item, time, kind, event_id, value in zip(
        item_ids, timestamps, event_types or nothing, event_ids or nothing, values or nothing
    ):
        if isinstance(item, bool) or not isinstance(item, (str, int, np.integer)):
            raise DataError(f"append: expected item ids as strings or whole numbers, got {item!r}.")
        if isinstance(time, bool) or not isinstance(time, (int, np.integer)) or not 0 <= time < 2**62:
            raise DataError(f"append: expected timestamps as whole seconds >= 0, got {time!r}.")
        events.append(Event(str(item), int(time), kind, event_id, None if value is None else _number(value)))
    return events


def roll_history(previous: bytes, events: Sequence[Event]) -> bytes:
    """Return the rolling hash after `events`, in order.

    Each step hashes the last hash, then the event's length-marked parts; the value only where there is one.
    """
    for event in events:
        digest = hashlib.sha256(previous)
        parts = [str(event.timestamp), event.item_id, event.event_type or "", event.event_id or ""]
        if event.value is not None:
            parts.append(event.value.hex())
        for part in parts:
            data = part.encode()
            digest.update(len(data).to_bytes(4, "big") + data)
        previous = digest.digest()
    return previous


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or math.isnan(value):
        raise DataError(f"append: expected values as numbers or None, got {value!r}.")
    return float(value)
