"""Keeps user states equal to the event log: appends, replays what late events change, rebuilds. No threads, no HTTP.

The one invariant: a record of `seq` s holds exactly what the log held of this user after entry s, in the one order.
Whoever wants a state asks the log what changed since s (`state_plan.py`) and does it. Summaries of untouched chunks
stay; the window's rows are computed again from them and the raw events of L * W chunks before (design section 3).
However a state came to be, it says the same.

The caller holds the user's lock during `current`, `current_together` and `catch_up`.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

from msgspec import structs

from ksa_serving.buckets import Buckets
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner, StoredEvent, sort_events
from ksa_serving.messages import StateSource
from ksa_serving.models import Mark, SizedState
from ksa_serving.release import Release
from ksa_serving.state_plan import (
    Work,
    appending,
    follow,
    newest_mark,
    plan_work,
    read_with_rests,
    rebuilding,
    replay_cost,
    what_changed,
    with_events,
)
from ksa_serving.state_store import StateRecord, StateStore
from ksa_serving.user_view import UserHead, UserView
from recsys_ksa.errors import OutOfOrderError, StateError

logger = logging.getLogger(__name__)

Current = tuple[StateRecord, StateSource]
"""A record that knows every event of the log at some instant, and where it came from."""
MARK_EVENTS = 1024
"""A mark of the history hash is set about every so many events."""
RESTING_STEP_EVENTS = 128
"""Appended between two rests: tens of milliseconds of a processor after 100,000 events (4 layers, 64 wide), of which
about one is Python's, which answers wait for."""
FEW_EVENTS = 32
"""Of one user: more are not appended together with other users' events, who would wait for them."""


class UserStates:
    """The states of one release over one event log.

    rebuilds counts why states were built from the whole log: `absent`, `mismatch`, `unrewindable`, `known-items`.
    replays counts why states were rewound: `late`, `retracted`, `cold`.
    """

    def __init__(
        self,
        release: Release,
        log: EventLog,
        store: StateStore,
        rebuild_step_events: int = 8192,
        inline_events: int | None = None,
        replays: Buckets[Owner] | None = None,
    ):
        """Keep states of `release`.

        Args:
            rebuild_step_events: events appended at once.
            inline_events: `current` computes at most so many events; beyond it answers degraded. None: always all.
            replays: the events that `current` may read again of each user where some were late or taken back; beyond
                it answers degraded. What `settle` reads again is owed there. None: always all.
        """
        self.release = release
        self.rebuilds: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self.appends = 0
        self._model = release.model
        self._log = log
        self._store = store
        self._step = rebuild_step_events
        self._rest: Callable[[float], None] | None = None
        self._inline = inline_events
        self._replays = replays

    def current(self, owner: Owner, inline: bool = True) -> Current:
        """Return the record that knows every event of the log at this instant, and where it came from.

        Where that takes more than `inline_events`, or than is left of the user's replays, and `inline` is set, a
        *degraded* one: the record held, which knows less, or one of the newest events alone. `settle` does the work
        then.
        """
        record = self.held(owner)
        with self._log.view(owner) as view:
            work = self._plan(owner, record, view)
            if not self._may(work, inline):
                return self._degraded(owner, None if work.why == "mismatch" else record, view)
            work = with_events(work, partial(self._newest, view))
        if not work.head.num_events or work.why == "nothing":
            return self._as_it_is(work)
        done = self._do(work)
        self._store.put(done)
        if work.why in self.rebuilds:
            return done, "rebuilt"
        return done, "store" if work.record.cold else self._model.tier

    def current_together(self, owners: Sequence[Owner]) -> list[Current | None]:
        """Return what `current` returns for each of several users, their new events appended in one pass.

        None where that takes more than a few appended events, or is not known without reading a disk: ask `current`.
        """
        works = [self._few(owner) for owner in owners]
        growing = [work for work in works if work is not None and work.why == "append"]
        grown: dict[Owner, StateRecord] = {}
        if growing:
            try:
                grown = self._append_together(growing)
            except (OutOfOrderError, StateError) as error:  # `current` finds out whose state it is, and rebuilds it
                logger.info("states cannot be appended to together: %s", error)
                works = [None if work in growing else work for work in works]
        for record in grown.values():
            self._store.put(record)
        return [
            None if work is None else (grown[owner], self._model.tier) if owner in grown else self._as_it_is(work)
            for owner, work in zip(owners, works)
        ]

    def meanwhile(self, owner: Owner) -> Current:
        """Return what `current` does while `settle` is at work: where a state is held, that, whatever changed since."""
        record, head = self.held(owner), self._log.head(owner)
        if record is None or record.cold or record.generation != head.generation or record.seq == head.last_seq:
            return self.current(owner)
        return record, "degraded"

    def settle(self, owner: Owner) -> StateRecord:
        """Return the whole state whatever it costs, and hold it; for background work."""
        return self.current(owner, inline=False)[0]

    def resting(self, rest: Callable[[float], None]) -> "UserStates":
        """Return what reads and computes the same in short steps, and calls `rest` with the seconds that each one took.

        Where `rest` raises, the state is given up.
        """
        resting = copy(self)
        resting._step, resting._rest = min(self._step, RESTING_STEP_EVENTS), rest
        return resting

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

    def catch_up(self, owner: Owner) -> bool:
        """Bring a state that is held up to the log; return False where that is for `settle`.

        States that are not held are left to the next answer that needs one: loading a log costs no model work.
        """
        if self._store.ready(owner, self.release.state_fingerprint) is None:
            return True
        return self.current(owner)[1] != "degraded"

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
            if follow(record, given, self.release.tie):
                return self._append(record, given)
            stored = [event for event in view.newest(view.head.num_events) if event.seq <= record.seq]
        both = sort_events(stored + given, self.release.tie)
        head = structs.replace(view.head, num_events=len(both))
        if len(stored) == record.num_events:  # nothing of what the record knows was retracted since
            kept = sum(event.timestamp < given[0].timestamp for event in stored)
            work = Work(record, head, kept, newest_mark(record, kept), 0, both, given, "late")
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
            vocabulary=self._model.vocabulary,
        )

    # -- what to do -------------------------------------------------------------------------------------------

    def _plan(self, owner: Owner, record: StateRecord | None, view: UserView) -> Work:
        if record is None:
            return rebuilding(self.empty(owner, view.head), view.head, "absent")
        if record.vocabulary != self._model.vocabulary:  # a release with more items, or one before it
            if self._model.reads_anew(record.state, record.vocabulary, view.item_ids()):
                return rebuilding(self.empty(owner, view.head), view.head, "known-items")
            record = replace(record, vocabulary=self._model.vocabulary)
            if not record.cold:
                self._store.put(record)
        work = plan_work(record, view, self._model, self.release.tie)
        if work.why != "mismatch":
            return work
        self._store.drop(owner)
        return replace(work, record=self.empty(owner, view.head))

    def _may(self, work: Work, inline: bool) -> bool:
        """Return whether this work may be done now, and take it from the user's replays where it is one."""
        if inline and self._inline is not None and work.num_appended > self._inline:
            return False
        if self._replays is None or work.why not in ("late", "retracted"):
            return True
        owner, cost = work.record.owner, replay_cost(self._model, work.head.num_events, work.kept)
        if inline:
            return not self._replays.take(owner, cost)
        self._replays.owe(owner, cost)
        return True

    def _few(self, owner: Owner) -> Work | None:
        """Return the work for a user's state where that is next to nothing."""
        record = self._store.ready(owner, self.release.state_fingerprint)
        if record is None or record.cold or record.vocabulary != self._model.vocabulary:
            return None
        with self._log.view(owner) as view:
            if view.head.num_events - record.num_events > FEW_EVENTS:
                return None
            why, changes = what_changed(record, view, self.release.tie)
            return appending(record, view.head, changes.added) if why in ("nothing", "append") else None

    def _append_together(self, works: Sequence[Work]) -> dict[Owner, StateRecord]:
        states = self._model.append_batch([work.record.state for work in works], [work.events for work in works])
        self.appends += len(works)
        return {
            work.record.owner: self._moved(self._grown(work.record, state, work.events), work.head)
            for work, state in zip(works, states)
        }

    def _as_it_is(self, work: Work) -> Current:
        """Return a record that needs no work: entries that left nothing behind are behind it now."""
        if not work.head.num_events:
            return self._moved(self.empty(work.record.owner, work.head), work.head), "none"
        return self._moved(work.record, work.head), self._model.tier

    def _do(self, work: Work) -> StateRecord:
        """Return the record that `work` leads to."""
        if work.why == "append":
            self.appends += 1
            try:
                return self._moved(self._append(work.record, work.events), work.head)
            except OutOfOrderError:
                logger.exception("service and library disagree about the order of a history; the state is rebuilt")
                return self._rebuild(work, "mismatch")
        if work.why in ("absent", "mismatch", "known-items"):
            return self._rebuild(work, work.why)
        try:
            record = self._revised(work)
        except StateError as error:
            logger.info("a state cannot be rewound and is rebuilt: %s", error)
            return self._rebuild(work, "unrewindable")
        self.replays[work.why] += 1
        return self._moved(record, work.head)

    def _revised(self, work: Work) -> StateRecord:
        """Return the record rewound to what stays, with the rest appended."""
        record = self._append(self._rewound(work), work.events[work.kept - work.first :])
        if work.added is None:
            _, everything = self._read(work.record.owner)
            everything = [event for event in everything if event.seq <= work.head.last_seq]
            state = self._model.with_own_items(record.state, None, everything)
        else:
            state = self._model.with_own_items(record.state, work.record.state, work.added)
        return replace(record, state=state, nbytes=_nbytes(state))

    def _rebuild(self, work: Work, why: str) -> StateRecord:
        self.rebuilds[why] += 1
        owner, events = work.record.owner, work.events
        head = work.head
        if len(events) != head.num_events:
            head, events = self._read(owner)
        return self._moved(self._append(self.empty(owner, head), events), head)

    def _read(self, owner: Owner) -> tuple[UserHead, list[StoredEvent]]:
        """Return a user's head and all their events in the one order, both of one instant."""
        with self._log.view(owner) as view:
            return view.head, self._newest(view, view.head.num_events)

    def _newest(self, view: UserView, count: int) -> list[StoredEvent]:
        """Return the last `count` events; with rests, where this is to rest."""
        return view.newest(count) if self._rest is None else read_with_rests(view, count, self._rest)

    def _rewound(self, work: Work) -> StateRecord:
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

    def _degraded(self, owner: Owner, record: StateRecord | None, view: UserView) -> Current:
        """Return what can be had at once: the state held before the change, or one of the newest events alone."""
        if record is not None and not record.cold and record.generation == view.head.generation:
            return record, "degraded"
        events = view.newest(min(self._log_span(), view.head.num_events))
        newest = self._append(self.empty(owner, view.head), events)
        return replace(self._moved(newest, view.head), marks=()), "degraded"

    def _log_span(self) -> int:
        """Return how many of the newest events a degraded answer reads."""
        return min(self._inline or 1, 2 * self._model.window_chunks * self._model.chunk_size + self._model.chunk_size)

    def _append(self, record: StateRecord, events: Sequence[StoredEvent]) -> StateRecord:
        """Return the record with `events`, in order, appended; in steps, so that a long rebuild's memory is bounded."""
        for start in range(0, len(events), self._step):
            began = time.monotonic()
            given = events[start : start + self._step]
            record = self._grown(record, self._model.append(record.state, given), given)
            if self._rest is not None:
                self._rest(time.monotonic() - began)
        return record

    def _grown(self, record: StateRecord, state: Any, events: Sequence[StoredEvent]) -> StateRecord:
        """Return the record after `events`, at least one, that led to `state`."""
        marks = record.marks
        if state.num_events - (marks[-1].num_events if marks else 0) >= MARK_EVENTS:
            marks = (*marks, Mark(state.num_events, state.history_hash))
        return replace(
            record,
            num_events=record.num_events + len(events),
            last_order=events[-1].order(self.release.tie),
            marks=marks,
            state=state,
            nbytes=_nbytes(state),
        )

    def _moved(self, record: StateRecord, head: UserHead) -> StateRecord:
        return replace(record, generation=head.generation, seq=head.last_seq, chain=head.chain)


def _nbytes(state: SizedState) -> int:
    return state.nbytes + state.seen_nbytes + state.fixed_nbytes
