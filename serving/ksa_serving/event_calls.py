"""Calls that keep, correct, retract, delete and show events. What cannot be kept is rejected one by one; the rest is
committed by the event log, and only then answered. Afterwards a state that is held catches up in the background.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from ksa_serving import admission
from ksa_serving.buckets import Buckets
from ksa_serving.context import NOBODY, Context
from ksa_serving.errors import InvalidRequestError, RateError, UnknownEventError
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner, StoredEvent
from ksa_serving.log_entries import AppendResult, Outcome
from ksa_serving.messages import (
    EventMessage,
    EventResult,
    EventsAnswer,
    EventsBatchAnswer,
    EventsBatchRequest,
    EventsRequest,
    ForgottenAnswer,
    HistoryAnswer,
    KeptEvent,
)
from ksa_serving.metrics import Metrics
from ksa_serving.models import Model
from ksa_serving.releases import Releases
from ksa_serving.settings import ServeSettings
from ksa_serving.state_plan import replay_cost
from ksa_serving.state_store import StateStore
from ksa_serving.upkeep import Upkeep
from ksa_serving.user_locks import UserLocks
from ksa_serving.workers import Workers

ADDED: frozenset[Outcome] = frozenset(("accepted", "late", "late-far"))
"""What became of events that the log did not have."""
RESULTS: dict[Outcome, EventResult] = {
    "accepted": EventResult("accepted"),
    "late": EventResult("late-applied"),
    "late-far": EventResult("late-queued"),
    "duplicate": EventResult("duplicate"),
    "conflict": EventResult("rejected", "conflict"),
    "full": EventResult("rejected", "history-full"),
    "unknown": EventResult("rejected", "unknown-event"),
}
BURST_SECONDS = 50
"""Of `user_events_per_second`, which may be sent for a user at once."""
MOST_SHOWN = 10_000
"""Events in one answer that shows a history."""


class EventCalls:
    """One service's calls about events. They run on one event loop."""

    def __init__(
        self,
        log: EventLog,
        store: StateStore,
        releases: Releases,
        locks: UserLocks,
        workers: Workers,
        upkeep: Upkeep,
        metrics: Metrics,
        settings: ServeSettings,
        clock: Callable[[], float],
        replays: Buckets[Owner],
    ):
        self._log = log
        self._store = store
        self._releases = releases
        self._locks = locks
        self._workers = workers
        self._upkeep = upkeep
        self._metrics = metrics
        self._limits = settings.limits
        self._deadline_seconds = settings.deadline_seconds
        self._clock = clock
        self._replays = replays
        rate = settings.user_events_per_second
        self._rates = Buckets[Owner](rate, BURST_SECONDS * rate) if rate else None

    def check_rate(self, owner: Owner) -> None:
        """Refuse a user for whom too many events came lately; asked before a body is decoded, too.

        A call is taken while there is room for one event, and may overdraw: so who is refused costs nothing, and who
        comes back when told to is not refused again for being large.

        Raises:
            RateError: nothing was kept.
        """
        if self._rates is not None and (wait := self._rates.wait(owner, 1)):
            raise RateError("events: more come for this user than are kept. Send them again later.", wait)

    async def post(self, user_id: str, request: EventsRequest, context: Context = NOBODY) -> EventsAnswer:
        """Keep events; return when they are on disk.

        Raises:
            InvalidRequestError: the user id or the number of events is out of its limits.
            OverloadedError, RateError, DeadlineError, EventLogError: nothing was kept; the call can be sent again.
        """
        owner = context.owner(user_id, self._limits)
        admission.check_num_events(len(request.events), self._limits)
        deadline = context.work_until(self._deadline_seconds)
        self.check_rate(owner)
        return await self._kept(owner, request.events, deadline)

    async def _kept(self, owner: Owner, events: Sequence[EventMessage], deadline: float) -> EventsAnswer:
        """Keep those of one user's events that can be kept."""
        if self._rates is not None:
            self._rates.owe(owner, len(events))
        results = [self._rejection(event) for event in events]
        kept = [place for place, rejection in enumerate(results) if rejection is None]
        if kept:
            future = self._log.submit(owner, [new_event(events[place]) for place in kept], deadline)
            appended = await self._workers.wait_for(future)
            for place, result in zip(kept, self._results(owner, appended)):
                results[place] = result
            seq = appended.head.last_seq
            if added := sum(outcome in ADDED for outcome in appended.outcomes):
                self._upkeep.catch_up(owner, added)
        else:
            seq = (await self._workers.run(self._log.head, owner)).last_seq
        return self._counted([result for result in results if result is not None], seq)

    async def post_batch(self, request: EventsBatchRequest, context: Context = NOBODY) -> EventsBatchAnswer:
        """Keep events of several users; each user's are kept whole or not at all.

        Raises:
            InvalidRequestError: too many users or events, or a user id out of its limits: nothing was kept.
            RateError: too many came lately for one of them: nothing was kept.
            OverloadedError, DeadlineError, EventLogError: some users' events may be kept; the call can be sent again.
        """
        admission.check_num_users(len(request.users), self._limits)
        admission.check_num_events(sum(len(user.events) for user in request.users), self._limits)
        deadline = context.work_until(self._deadline_seconds)
        owners = [context.owner(user.user_id, self._limits) for user in request.users]
        for owner in owners:
            self.check_rate(owner)
        calls = [self._kept(owner, user.events, deadline) for owner, user in zip(owners, request.users)]
        answers: list[EventsAnswer] = []
        for answer in await asyncio.gather(*calls, return_exceptions=True):  # nothing is kept after the call's answer
            if isinstance(answer, BaseException):
                raise answer
            answers.append(answer)
        return EventsBatchAnswer(answers)

    async def correct(
        self, user_id: str, event_id: str, event: EventMessage, context: Context = NOBODY
    ) -> EventsAnswer:
        """Put a payload in place of the one kept under `event_id`; kept as new where there is none.

        Raises:
            OverloadedError, DeadlineError, EventLogError: nothing was changed; the call can be sent again.
        """
        owner = context.owner(user_id, self._limits)
        deadline = context.work_until(self._deadline_seconds)
        if event.event_id not in (None, event_id):
            raise InvalidRequestError("event_id: expected the one of the path, or none, got another.", "contradiction")
        new = NewEvent(event.item_id, event.timestamp, event_id, event.event_type, event.value)
        rejection = self._rejection(
            EventMessage(event.item_id, event.timestamp, event_id, event.event_type, event.value)
        )
        if rejection is not None:
            head = await self._workers.run(self._log.head, owner)
            return self._counted([rejection], head.last_seq)
        return await self._changed(owner, await self._workers.wait_for(self._log.correct(owner, new, deadline)))

    async def retract(self, user_id: str, event_id: str, context: Context = NOBODY) -> EventsAnswer:
        """Take an event back.

        Raises:
            UnknownEventError: the log has none of this id.
            OverloadedError, DeadlineError, EventLogError: nothing was changed; the call can be sent again.
        """
        owner = context.owner(user_id, self._limits)
        deadline = context.work_until(self._deadline_seconds)
        result = await self._workers.wait_for(self._log.retract(owner, event_id, deadline))
        if result.outcomes == ["unknown"]:
            raise UnknownEventError("event: expected one that was kept, got another id.")
        return await self._changed(owner, result)

    async def forget(self, user_id: str, context: Context = NOBODY) -> ForgottenAnswer:
        """Delete a user: at once for every later request, from the disks within a minute.

        Raises:
            OverloadedError, DeadlineError, EventLogError: nothing was deleted; the call can be sent again.
        """
        owner = context.owner(user_id, self._limits)
        deadline = context.work_until(self._deadline_seconds)
        async with self._locks.of(owner):  # so that no state of the old generation is put after it was dropped
            num_events = await self._workers.wait_for(self._log.forget(owner, deadline))
            await self._workers.run(self._store.drop, owner)
            self._upkeep.forget(owner)
        self._metrics.forgotten.inc()
        self._upkeep.purge()
        return ForgottenAnswer(num_events, ["log", "memory", "cold"])

    async def history(
        self, user_id: str, limit: int = 1000, before: int | None = None, context: Context = NOBODY
    ) -> HistoryAnswer:
        """Return the newest events of a user, or those before index `before`, in order."""
        owner = context.owner(user_id, self._limits)
        if not 1 <= limit <= MOST_SHOWN:
            raise InvalidRequestError(f"limit: expected 1 to {MOST_SHOWN}, got {limit}.", "invalid-limit")
        return await self._workers.run(self._history, owner, limit, before)

    def _history(self, owner: Owner, limit: int, before: int | None) -> HistoryAnswer:
        model = self._releases.active.release.model
        with self._log.view(owner) as view:
            end = view.head.num_events if before is None else max(0, min(before, view.head.num_events))
            first = max(0, end - limit)
            return HistoryAnswer(
                events=kept_events(model, first, view.between(first, end - 1) if end else []),
                num_events=view.head.num_events,
                seq=view.head.last_seq,
                chunk_size=model.chunk_size,
                window_chunks=model.window_chunks,
            )

    def _rejection(self, event: EventMessage) -> EventResult | None:
        fault = admission.event_fault(event, self._limits, self._releases.active.release.clock, self._clock())
        return None if fault is None else EventResult("rejected", fault)

    async def _changed(self, owner: Owner, result: AppendResult) -> EventsAnswer:
        """Answer a change of what was kept before."""
        self._upkeep.catch_up(owner)
        seq = (await self._workers.run(self._log.head, owner)).last_seq
        return self._counted(self._results(owner, result), seq)

    def _results(self, owner: Owner, appended: AppendResult) -> list[EventResult]:
        """Return what callers are told: late events that cost more than is left to their user wait."""
        results = [RESULTS[outcome] for outcome in appended.outcomes]
        if "late" in appended.outcomes:
            num_events = appended.head.num_events
            model = self._releases.active.release.model
            if self._replays.wait(owner, replay_cost(model, num_events, num_events - appended.events_after)):
                return [RESULTS["late-far"] if result is RESULTS["late"] else result for result in results]
        return results

    def _counted(self, results: list[EventResult], seq: int) -> EventsAnswer:
        for result, times in Counter(results).items():
            self._metrics.events.labels(result.status).inc(times)
            if result.reason is not None:
                self._metrics.rejections.labels(result.reason).inc(times)
        return EventsAnswer(results, seq)


def new_event(event: EventMessage) -> NewEvent:
    """Return an event of a request as the log takes it."""
    return NewEvent(event.item_id, event.timestamp, event.event_id, event.event_type, event.value)


def kept_events(model: Model, first: int, events: Sequence[StoredEvent]) -> list[KeptEvent]:
    """Return events of the log as answers show them; `first` is the index of the first."""
    return [
        KeptEvent(
            index=index,
            chunk=index // model.chunk_size,
            item_id=event.item_id,
            timestamp=event.timestamp,
            event_id=event.event_id,
            event_type=event.event_type,
            value=event.value,
            title=model.title(event.item_id),
        )
        for index, event in enumerate(events, start=first)
    ]
