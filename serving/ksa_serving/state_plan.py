"""What has to be done so that a record says what the log says: the least work, found by asking what changed since.

- Events that all follow the record's last one are *appended*.
- An event that lies before it, or one that was retracted, leaves the events before it as they were: the state is
  *rewound* to those and the rest appended again. A *cold* record is made whole in the same way, from its own end.
- Without a record, or with one that cannot be proved to come from this log, everything is *rebuilt*; so it is where the
  user has items that were unknown to the model that computed it, and are known now.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ksa_serving.events import StoredEvent
from ksa_serving.models import START, Mark, Model
from ksa_serving.state_store import StateRecord
from ksa_serving.user_view import Changes, UserHead, UserView
from recsys_ksa.order import TieKind

RESTING_READ_EVENTS = 1024
"""Read from the log between two rests: milliseconds of Python."""

Why = Literal["nothing", "append", "late", "retracted", "cold", "absent", "mismatch", "known-items"]


@dataclass(frozen=True)
class Work:
    """What brings a record up to the log.

    record: what to start from. kept: how many of its first events stay. first: index of the first of `events`.
    events: the log's events from there on; none before `with_events`, unless they are appended.
    added: those that the record lacks; None: own items are counted anew.
    """

    record: StateRecord
    head: UserHead
    kept: int
    mark: Mark
    first: int
    events: list[StoredEvent]
    added: list[StoredEvent] | None
    why: Why

    @property
    def num_appended(self) -> int:
        """Events that the model has to read again, but for the window's warm-up."""
        return self.head.num_events - self.kept


def plan_work(record: StateRecord, view: UserView, model: Model, tie: TieKind) -> Work:
    """Return the least work that leads from `record` to the log's state."""
    why, changes = what_changed(record, view, tie)
    if why == "mismatch":
        return rebuilding(record, view.head, why)
    if why in ("nothing", "append"):
        return appending(record, view.head, changes.added)
    if why == "cold":
        kept, mark = record.num_events, Mark(record.num_events, record.state.history_hash)
    else:
        touched = min([*changes.retracted, *(event.timestamp for event in changes.added)])
        kept = view.head.num_events - view.count_from(touched)
        mark = newest_mark(record, kept)
    first = max(0, min(mark.num_events, model.replay_start(kept) - 1))
    return Work(record, view.head, kept, mark, first, [], None if changes.retracted else changes.added, why)


def with_events(work: Work, newest: Callable[[int], list[StoredEvent]]) -> Work:
    """Return work that can be done: until then its events, which may be many, are not read.

    Args:
        newest: returns the last so many events of the log, in order.
    """
    if work.why in ("nothing", "append"):
        return work
    return replace(work, events=newest(work.head.num_events - work.first))


def read_with_rests(view: UserView, count: int, rest: Callable[[float], None]) -> list[StoredEvent]:
    """Return the last `count` events; after each piece `rest` is called with the seconds it took."""
    events, end = list[StoredEvent](), view.head.num_events
    firsts = range(end - count, end, RESTING_READ_EVENTS)
    began = time.monotonic()
    for piece in view.walk((first, min(first + RESTING_READ_EVENTS, end) - 1) for first in firsts):
        events += piece
        rest(time.monotonic() - began)
        began = time.monotonic()
    return events if len(events) == count else view.newest(count)  # which tells what is wrong


def replay_cost(model: Model, num_events: int, kept: int) -> int:
    """Return how many events are read again where of a history of `num_events` the first `kept` stay as they were."""
    return num_events - model.replay_start(max(0, kept))


def what_changed(record: StateRecord, view: UserView, tie: TieKind) -> tuple[Why, Changes]:
    """Return what happened since `record`, and what that asks for."""
    changes = view.changes(record.seq)
    count = record.num_events + len(changes.added) - len(changes.retracted)
    proved = record.generation == view.head.generation and view.chain_at(record.seq) == record.chain
    if not proved or count != view.head.num_events:
        return "mismatch", changes
    if changes.retracted:
        return "retracted", changes
    if not follow(record, changes.added, tie):
        return "late", changes
    if record.cold:
        return "cold", changes
    return "append" if changes.added else "nothing", changes


def appending(record: StateRecord, head: UserHead, added: list[StoredEvent]) -> Work:
    """Return the work of appending what follows the record's last event."""
    end = record.num_events
    return Work(record, head, end, Mark(end, b""), end, added, added, "append" if added else "nothing")


def rebuilding(record: StateRecord, head: UserHead, why: Literal["absent", "mismatch", "known-items"]) -> Work:
    """Return the work of reading everything again."""
    return Work(record, head, 0, START, 0, [], None, why)


def follow(record: StateRecord, events: Sequence[StoredEvent], tie: TieKind) -> bool:
    """Return whether all `events`, which are in order, come after the record's last."""
    if not events or record.last_order is None:
        return True
    if events[0].timestamp != record.last_order[0][0]:
        return events[0].timestamp > record.last_order[0][0]
    return events[0].order(tie) > record.last_order


def newest_mark(record: StateRecord, kept: int) -> Mark:
    """Return the newest mark among the first `kept` events."""
    return max((mark for mark in (START, *record.marks) if mark.num_events <= kept), key=lambda m: m.num_events)
