"""Keeps user states equal to the event log: catches up, notices late events, rebuilds. No threads, no HTTP.

The one invariant: a record of `seq` s holds exactly the user's events of the log with sequence numbers up to s, in
the one order. Whoever wants a state reads the events after s; if they all follow, they are appended, and if one lies
before the state's last, the state is dropped and rebuilt from the log. Appending is exact for any cut of a history,
so a rebuilt state equals one that grew event by event.

The caller holds the user's lock during `current` and `catch_up`.
"""

import logging
from collections import Counter
from collections.abc import Sequence

from ksa_serving.errors import EventLogError
from ksa_serving.event_log import EventLog, UserHead
from ksa_serving.events import NewEvent, Owner, StoredEvent, sort_events
from ksa_serving.messages import StateSource
from ksa_serving.release import Release, SizedState
from ksa_serving.state_store import StateRecord, StateStore
from recsys_ksa.errors import OutOfOrderError

logger = logging.getLogger(__name__)


class UserStates:
    """The states of one release over one event log.

    `rebuilds` counts why states were built from the log: `absent`, `late`, `mismatch`.
    """

    def __init__(self, release: Release, log: EventLog, store: StateStore, rebuild_step_events: int = 8192):
        self.rebuilds: Counter[str] = Counter()
        self._release = release
        self._log = log
        self._store = store
        self._step = rebuild_step_events

    def current(self, owner: Owner) -> tuple[StateRecord, StateSource]:
        """Return the record that knows every event of the log at this instant, and where it came from."""
        record, why = self._caught_up(owner)
        if record is not None:
            return record, "host"
        head, events = self._log.read(owner)
        if not events:
            return self.empty(owner, head), "none"
        if len(events) != head.num_events:
            raise EventLogError(f"event log: expected {head.num_events} events of a user, got {len(events)}: damaged.")
        self.rebuilds[why] += 1
        record = self._append(self.empty(owner, head), events)
        self._store.put(record)
        return record, "rebuilt"

    def catch_up(self, owner: Owner) -> None:
        """Append what the log has newly kept to a state that is held; drop it after a late event.

        States that are not held are left to the next answer that needs one: loading a log costs no model work.
        """
        self._caught_up(owner)

    def held(self, owner: Owner) -> StateRecord | None:
        """Return the record held, as it is."""
        return self._store.get(owner, self._release.state_fingerprint)

    def with_events(self, record: StateRecord, events: Sequence[NewEvent]) -> StateRecord:
        """Return a record that also knows `events`, which are not kept; those it knows already are left out.

        Exact also where they lie before the record's last event: then all is computed anew, for this answer only.
        """
        known = self._log.known(record.owner, events, record.seq)
        fresh: dict[bytes, NewEvent] = {}
        for event, is_known in zip(events, known):
            if not is_known:
                fresh.setdefault(event.identity, event)
        given = sort_events(
            [
                StoredEvent(record.seq + n, e.item_id, e.timestamp, e.event_id, e.event_type, e.value)
                for n, e in enumerate(fresh.values(), start=1)
            ],
            self._release.tie,
        )
        if self._follow(record, given):
            return self._append(record, given)
        head, stored = self._log.read(record.owner)
        stored = [event for event in stored if event.seq <= record.seq]
        return self._append(self.empty(record.owner, head), sort_events(stored + given, self._release.tie))

    def empty(self, owner: Owner, head: UserHead) -> StateRecord:
        """Return the record of a user without events."""
        state = self._release.recommender.new_state()
        fingerprint = self._release.state_fingerprint
        return StateRecord(owner, head.generation, fingerprint, 0, 0, None, state, _nbytes(state))

    def _caught_up(self, owner: Owner) -> tuple[StateRecord | None, str]:
        """Return the held record brought up to the log, or None and why not; a record that cannot be is dropped."""
        record = self.held(owner)
        if record is None:
            return None, "absent"
        head, events = self._log.read(owner, record.seq)
        if record.generation != head.generation or record.num_events + len(events) != head.num_events:
            why = "mismatch"
        elif not self._follow(record, events):
            why = "late"
        else:
            try:
                if events:
                    record = self._append(record, events)
                    self._store.put(record)
                return record, ""
            except OutOfOrderError:
                logger.exception("service and library disagree about the order of a history; the state is rebuilt")
                why = "mismatch"
        self._store.drop(owner)
        return None, why

    def _follow(self, record: StateRecord, events: Sequence[StoredEvent]) -> bool:
        """Return whether all `events`, which are in order, come after the record's last."""
        if not events or record.last_order is None:
            return True
        if events[0].timestamp != record.last_order[0][0]:
            return events[0].timestamp > record.last_order[0][0]
        return events[0].order(self._release.tie) > record.last_order

    def _append(self, record: StateRecord, events: Sequence[StoredEvent]) -> StateRecord:
        """Return the record with `events`, in order, appended; in steps, so that a long rebuild's memory is bounded."""
        state = record.state
        by_id = self._release.tie == "id"
        for start in range(0, len(events), self._step):
            step = events[start : start + self._step]
            types = [event.event_type for event in step]
            state = self._release.recommender.append(
                state,
                [event.item_id for event in step],
                [event.timestamp for event in step],
                types if any(kind is not None for kind in types) else None,
                event_ids=[event.event_id for event in step] if by_id else None,
            )
        return StateRecord(
            owner=record.owner,
            generation=record.generation,
            fingerprint=record.fingerprint,
            num_events=record.num_events + len(events),
            seq=max([record.seq, *(event.seq for event in events)]),
            last_order=events[-1].order(self._release.tie) if events else record.last_order,
            state=state,
            nbytes=_nbytes(state),
        )


def _nbytes(state: SizedState) -> int:
    return state.nbytes + state.seen_nbytes + state.fixed_nbytes
