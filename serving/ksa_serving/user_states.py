"""Keeps user states equal to the event log: appends, replays what late events change, rebuilds. No threads, no HTTP.

The one invariant: a record of `seq` s holds exactly what the log held of this user after entry s, in the one order.
Whoever wants a state asks the log what changed since s:

- events that all follow the last one are *appended*;
- an event that lies before it, or one that was retracted, leaves the events before it as they were: the state is
  *rewound* to those and the rest appended again. Summaries of untouched chunks stay; the window's rows are computed
  again from them and the raw events of L * W chunks before (design section 3). A *cold* record, which holds summaries
  only, is made whole in the same way, from its own end;
- without a record, or with one that cannot be proved to come from this log, everything is *rebuilt*.

All are exact, so a state says the same however it came to be.

The caller holds the user's lock during `current`, `catch_up` and `settle`.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner, StoredEvent, sort_events
from ksa_serving.messages import StateSource
from ksa_serving.models import START, Mark
from ksa_serving.release import Release
from ksa_serving.state_store import StateRecord, StateStore
from ksa_serving.user_view import UserHead, UserView
from recsys_ksa.errors import OutOfOrderError, StateError

logger = logging.getLogger(__name__)

MARK_EVENTS = 1024
"""A mark of the history hash is set about every so many events."""


@dataclass(frozen=True)
class _Work:
    """What brings a record up to the log.

    record: what to start from. kept: how many of its first events stay. first: index of the first of `events`.
    events: the log's events from there on. added: those that the record lacks; None: own items are counted anew.
    """

    record: StateRecord
    head: UserHead
    kept: int
    mark: Mark
    first: int
    events: list[StoredEvent]
    added: list[StoredEvent] | None
    why: str

    @property
    def num_appended(self) -> int:
        """Events that the model has to read again, but for the window's warm-up."""
        return self.head.num_events - self.kept


class UserStates:
    """The states of one release over one event log.

    rebuilds counts why states were built from the whole log: `absent`, `mismatch`, `unrewindable`.
    replays counts why states were rewound: `late`, `retracted`, `cold`.
    """

    def __init__(
        self,
        release: Release,
        log: EventLog,
        store: StateStore,
        rebuild_step_events: int = 8192,
        inline_events: int | None = None,
    ):
        """Keep states of `release`.

        Args:
            rebuild_step_events: events appended at once.
            inline_events: `current` computes at most so many events; beyond it answers degraded. None: always all.
        """
        self.release = release
        self.rebuilds: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self.appends = 0
        self._model = release.model
        self._log = log
        self._store = store
        self._step = rebuild_step_events
        self._inline = inline_events

    def current(self, owner: Owner, inline: bool = True) -> tuple[StateRecord, StateSource]:
        """Return the record that knows every event of the log at this instant, and where it came from.

        Where that takes more than `inline_events` and `inline` is set, a *degraded* one: the record held, which knows
        less, or one of the newest events alone. `settle` does the work then.
        """
        record = self.held(owner)
        with self._log.view(owner) as view:
            work = self._plan(owner, record, view)
            if inline and self._inline is not None and work.num_appended > self._inline:
                return self._degraded(record, work, view)
        if not work.head.num_events:
            return self.empty(owner, work.head), "none"
        if work.num_appended == 0 and not work.record.cold and work.kept == work.record.num_events:
            moved = replace(work.record, seq=work.head.last_seq, chain=work.head.chain)
            return moved, "host"
        done = self._do(work)
        self._store.put(done)
        if work.why in self.rebuilds:
            return done, "rebuilt"
        return done, "store" if work.record.cold else "host"

    def settle(self, owner: Owner) -> StateRecord:
        """Return the whole state whatever it costs, and hold it; for background work."""
        return self.current(owner, inline=False)[0]

    def audit(self, record: StateRecord) -> float | None:
        """Return how far a state is from one computed anew (`Model.difference`); None where it cannot be told.

        That is where the log has lost some of the record's events since: retracted, or the user deleted.
        """
        with self._log.view(record.owner) as view:
            events = [event for event in view.newest(view.head.num_events) if event.seq <= record.seq]
            if view.head.generation != record.generation or len(events) != record.num_events:
                return None
        anew = self._append(self.empty(record.owner, UserHead(record.generation)), events)
        return self._model.difference(record.state, anew.state)

    def catch_up(self, owner: Owner) -> None:
        """Bring a state that is held up to the log, where that is cheap.

        States that are not held are left to the next answer that needs one: loading a log costs no model work.
        """
        if self._store.ready(owner, self.release.state_fingerprint) is not None:
            self.current(owner)

    def held(self, owner: Owner) -> StateRecord | None:
        """Return the record held, as it is."""
        return self._store.get(owner, self.release.state_fingerprint)

    def with_events(self, record: StateRecord, events: Sequence[NewEvent]) -> StateRecord:
        """Return a record that also knows `events`, which are not kept; those it knows already are left out.

        Exact also where they lie before the record's last event. The record must know all of the log's events but
        those that came since; it must not be cold.
        """
        with self._log.view(record.owner) as view:
            known = view.known(events, record.seq)
            fresh: dict[bytes, NewEvent] = {}
            for event, is_known in zip(events, known):
                if not is_known:
                    fresh.setdefault(event.identity, event)
            given = sort_events(
                [
                    StoredEvent(record.seq + n, e.item_id, e.timestamp, e.event_id, e.event_type, e.value)
                    for n, e in enumerate(fresh.values(), start=1)
                ],
                self.release.tie,
            )
            if self._follow(record, given):
                return self._append(record, given)
            stored = [event for event in view.newest(view.head.num_events) if event.seq <= record.seq]
        both = sort_events(stored + given, self.release.tie)
        head = replace(view.head, num_events=len(both))
        if len(stored) == record.num_events:  # nothing of what the record knows was retracted since
            kept = sum(event.timestamp < given[0].timestamp for event in stored)
            work = _Work(record, head, kept, self._mark(record, kept), 0, both, given, "late")
            return self._revised(work)
        return self._append(self.empty(record.owner, head), both)

    def empty(self, owner: Owner, head: UserHead) -> StateRecord:
        """Return the record of a user without events."""
        return StateRecord(
            owner=owner,
            generation=head.generation,
            fingerprint=self.release.state_fingerprint,
            num_events=0,
            seq=0,
            chain=b"",
            last_order=None,
            marks=(),
            state=self._model.new_state(),
            nbytes=0,
        )

    # -- what to do -------------------------------------------------------------------------------------------

    def _plan(self, owner: Owner, record: StateRecord | None, view: UserView) -> _Work:
        """Return the least work that leads to the log's state."""
        head = view.head
        if record is None:
            return self._from_nothing(owner, view, "absent")
        changes = view.changes(record.seq)
        count = record.num_events + len(changes.added) - len(changes.retracted)
        proved = record.generation == head.generation and view.chain_at(record.seq) == record.chain
        if not proved or count != head.num_events:
            self._store.drop(owner)
            return self._from_nothing(owner, view, "mismatch")
        if not changes.retracted and self._follow(record, changes.added):
            if not record.cold:
                end = Mark(record.num_events, b"")
                return _Work(record, head, record.num_events, end, record.num_events, changes.added, changes.added, "")
            kept, mark, why = record.num_events, Mark(record.num_events, record.state.history_hash), "cold"
        else:
            why = "retracted" if changes.retracted else "late"
            touched = min([*changes.retracted, *(event.timestamp for event in changes.added)])
            kept = head.num_events - view.count_from(touched)
            mark = self._mark(record, kept)
        first = max(0, min(mark.num_events, self._model.replay_start(kept) - 1))
        events = view.newest(head.num_events - first)
        return _Work(record, head, kept, mark, first, events, None if changes.retracted else changes.added, why)

    def _from_nothing(self, owner: Owner, view: UserView, why: str) -> _Work:
        events = view.newest(view.head.num_events)
        return _Work(self.empty(owner, view.head), view.head, 0, START, 0, events, events, why)

    def _do(self, work: _Work) -> StateRecord:
        """Return the record that `work` leads to."""
        if not work.why:
            self.appends += 1
            try:
                return self._moved(self._append(work.record, work.events), work.head)
            except OutOfOrderError:
                logger.exception("service and library disagree about the order of a history; the state is rebuilt")
                return self._rebuild(work, "mismatch")
        if work.why in ("absent", "mismatch"):
            return self._rebuild(work, work.why)
        try:
            record = self._revised(work)
        except StateError as error:
            logger.info("a state cannot be rewound and is rebuilt: %s", error)
            return self._rebuild(work, "unrewindable")
        self.replays[work.why] += 1
        return self._moved(record, work.head)

    def _revised(self, work: _Work) -> StateRecord:
        """Return the record rewound to what stays, with the rest appended."""
        record = self._append(self._rewound(work), work.events[work.kept - work.first :])
        if work.added is None:
            _, everything = self._log.read(work.record.owner)
            everything = [event for event in everything if event.seq <= work.head.last_seq]
            state = self._model.with_own_items(record.state, None, everything)
        else:
            state = self._model.with_own_items(record.state, work.record.state, work.added)
        return replace(record, state=state, nbytes=_nbytes(state))

    @staticmethod
    def _mark(record: StateRecord, kept: int) -> Mark:
        """Return the newest mark among the first `kept` events."""
        return max((mark for mark in (START, *record.marks) if mark.num_events <= kept), key=lambda m: m.num_events)

    def _rebuild(self, work: _Work, why: str) -> StateRecord:
        self.rebuilds[why] += 1
        owner, events = work.record.owner, work.events
        head = work.head
        if len(events) != head.num_events:
            head, events = self._log.read(owner)
        return self._moved(self._append(self.empty(owner, head), events), head)

    def _rewound(self, work: _Work) -> StateRecord:
        """Return the record of the first `kept` events; its own items are unset."""
        record, kept = work.record, work.kept
        window = work.events[: kept - work.first]
        state = self._model.rewind(record.state, kept, work.first, window, work.mark)
        return replace(
            record,
            num_events=kept,
            last_order=window[-1].order(self.release.tie) if kept else None,
            marks=tuple(mark for mark in record.marks if mark.num_events <= kept),
            state=state,
            cold=False,
        )

    def _degraded(self, record: StateRecord | None, work: _Work, view: UserView) -> tuple[StateRecord, StateSource]:
        """Return what can be had at once: the state held before the change, or one of the newest events alone."""
        if (
            record is not None
            and not record.cold
            and record.generation == work.head.generation
            and work.why != "mismatch"
        ):
            return record, "degraded"
        span = self._log_span()
        events = view.newest(min(span, work.head.num_events))
        newest = self._append(self.empty(work.record.owner, work.head), events)
        return replace(self._moved(newest, work.head), marks=()), "degraded"

    def _log_span(self) -> int:
        """Return how many of the newest events a degraded answer reads."""
        return min(self._inline or 1, 2 * self._model.window_chunks * self._model.chunk_size + self._model.chunk_size)

    def _follow(self, record: StateRecord, events: Sequence[StoredEvent]) -> bool:
        """Return whether all `events`, which are in order, come after the record's last."""
        if not events or record.last_order is None:
            return True
        if events[0].timestamp != record.last_order[0][0]:
            return events[0].timestamp > record.last_order[0][0]
        return events[0].order(self.release.tie) > record.last_order

    def _append(self, record: StateRecord, events: Sequence[StoredEvent]) -> StateRecord:
        """Return the record with `events`, in order, appended; in steps, so that a long rebuild's memory is bounded."""
        state, marks = record.state, list(record.marks)
        for start in range(0, len(events), self._step):
            state = self._model.append(state, events[start : start + self._step])
            if state.num_events - (marks[-1].num_events if marks else 0) >= MARK_EVENTS:
                marks.append(Mark(state.num_events, state.history_hash))
        return replace(
            record,
            num_events=record.num_events + len(events),
            last_order=events[-1].order(self.release.tie) if events else record.last_order,
            marks=tuple(marks),
            state=state,
            nbytes=_nbytes(state),
        )

    def _moved(self, record: StateRecord, head: UserHead) -> StateRecord:
        return replace(record, generation=head.generation, seq=head.last_seq, chain=head.chain)


def _nbytes(state: object) -> int:
    return state.nbytes + state.seen_nbytes + state.fixed_nbytes  # type: ignore[attr-defined]
