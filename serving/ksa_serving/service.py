"""The story of one request, without HTTP: events go to the log, states follow the log, answers come from states.

*Events*: what cannot be kept is rejected one by one; the rest is committed by the event log, and only then answered.
Afterwards, in the background, a state that is held catches up.

*Recommend*: under the user's lock the state is brought up to the log (an append, or a rebuild), then the lock is let
go, for states are values, and the model answers in a worker thread. So an answer always knows every event that was
acknowledged before the question came.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from msgspec import UNSET

from ksa_serving.admission import check_num_events, check_recommend, check_user_id, event_fault
from ksa_serving.event_log import EventLog, Outcome
from ksa_serving.events import NewEvent, Owner
from ksa_serving.messages import (
    EventMessage,
    EventResult,
    EventsAnswer,
    EventsRequest,
    RecommendAnswer,
    RecommendRequest,
    ScoredItem,
    StateAnswer,
)
from ksa_serving.release import Release
from ksa_serving.settings import ServeSettings
from ksa_serving.state_store import StateRecord, StateStore
from ksa_serving.user_states import UserStates

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_CATCHING_UP = 256
"""Users whose states may wait to catch up in the background; others catch up when next asked for."""
RESULTS: dict[Outcome, EventResult] = {
    "accepted": EventResult("accepted"),
    "late": EventResult("late-applied"),
    "duplicate": EventResult("duplicate"),
    "conflict": EventResult("rejected", "conflict"),
}


class Service:
    """One process's service of one release. Its methods run on one event loop.

    Args:
        release: the recommender and its names.
        log: the event log; the service closes it.
        store: where states are held.
        clock: seconds since 1970; for the future check and missing request times.
    """

    def __init__(
        self,
        release: Release,
        log: EventLog,
        store: StateStore,
        settings: ServeSettings | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.release = release
        self.log = log
        self.store = store
        self.settings = settings or ServeSettings()
        self.states = UserStates(release, log, store, self.settings.rebuild_step_events)
        self.event_counts: Counter[str] = Counter()
        self.draining = False
        self._clock = clock
        self._locks: WeakValueDictionary[Owner, asyncio.Lock] = WeakValueDictionary()
        self._waiting: set[Owner] = set()
        self._catching_up: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(self.settings.model_threads, thread_name_prefix="model")

    async def post_events(self, user_id: str, request: EventsRequest) -> EventsAnswer:
        """Keep events; return when they are on disk.

        Raises:
            InvalidRequestError: the user id or the number of events is out of its limits.
            OverloadedError, EventLogError: nothing was kept; the call can be sent again.
        """
        check_user_id(user_id, self.settings.limits)
        check_num_events(len(request.events), self.settings.limits)
        owner = Owner(user_id)
        results = [self._rejection(event) for event in request.events]
        kept = [place for place, rejection in enumerate(results) if rejection is None]
        if kept:
            future = self.log.submit(owner, [_new_event(request.events[place]) for place in kept])
            appended = await asyncio.wrap_future(future)
            for place, outcome in zip(kept, appended.outcomes):
                results[place] = RESULTS[outcome]
            seq = appended.head.last_seq
            self._catch_up_later(owner)
        else:
            seq = (await self._in_thread(self.log.head, owner)).last_seq
        done = [result for result in results if result is not None]
        self.event_counts.update(result.status for result in done)
        return EventsAnswer(done, seq)

    async def recommend(self, user_id: str, request: RecommendRequest) -> RecommendAnswer:
        """Answer "what next?" from the user's events, those of the request, or none.

        Raises:
            InvalidRequestError: a value is out of range.
            EventLogError: the user's events cannot be read.
        """
        check_user_id(user_id, self.settings.limits)
        now = self._clock()
        check_recommend(request, self.settings.limits, self.release.clock, now)
        request_time = request.request_time
        if request_time is UNSET:
            request_time = int(now) if self.release.clock == "unix" else None
        owner = Owner(user_id)
        async with self._lock(owner):
            stored, source = await self._in_thread(self.states.current, owner)
        record, scored = await self._in_thread(self._answer, stored, request, request_time)
        longest = self.release.longest_trained_history
        return RecommendAnswer(
            items=[ScoredItem(item_id, float(score)) for item_id, score in scored],
            num_events=record.num_events,
            model_version=self.release.model_version,
            index_version=self.release.index_version,
            seq=stored.seq,
            state_seq=stored.seq,
            state_source=source,
            request_time=request_time,
            beyond_trained_length=longest is not None and record.num_events > longest,
        )

    async def state(self, user_id: str) -> StateAnswer:
        """Tell what is kept of a user; builds nothing."""
        check_user_id(user_id, self.settings.limits)
        owner = Owner(user_id)
        head = await self._in_thread(self.log.head, owner)
        record = await self._in_thread(self.states.held, owner)
        return StateAnswer(
            num_events=head.num_events,
            seq=head.last_seq,
            state_source="none" if record is None else "host",
            state_seq=0 if record is None else record.seq,
            nbytes=0 if record is None else record.state.nbytes,
            seen_nbytes=0 if record is None else record.state.seen_nbytes,
            fixed_nbytes=0 if record is None else record.state.fixed_nbytes,
            model_version=self.release.model_version,
            index_version=self.release.index_version,
            state_fingerprint=self.release.state_fingerprint,
        )

    def unready(self) -> str | None:
        """Return why no requests should come here, or None."""
        if self.draining:
            return "draining"
        if self.log.healthy:
            return None
        self.log.probe()
        return "event log cannot be written"

    async def close(self) -> None:
        """Let background work end, write what waits, close the log."""
        self.draining = True
        await asyncio.gather(*self._catching_up)
        await asyncio.to_thread(self.log.close)
        self._threads.shutdown()

    def _rejection(self, event: EventMessage) -> EventResult | None:
        fault = event_fault(event, self.settings.limits, self.release.clock, self._clock())
        return None if fault is None else EventResult("rejected", fault)

    def _answer(
        self, record: StateRecord, request: RecommendRequest, request_time: int | None
    ) -> tuple[StateRecord, list[tuple[str, float]]]:
        """Return the record that also knows the request's events, and the scored items. Runs in a worker thread."""
        if request.events:
            record = self.states.with_events(record, [_new_event(event) for event in request.events])
        exclude_seen = {"all": request.exclude_seen, "again": False, "new": True}[request.which]
        scored = self.release.recommender.recommend(
            record.state,
            k=request.k,
            request_time=request_time,
            exclude_seen=exclude_seen,
            only_seen=request.which == "again",
        )
        return record, scored

    def _catch_up_later(self, owner: Owner) -> None:
        """Bring a held state up to the log in the background; calls for one user that still waits are one."""
        if owner in self._waiting or len(self._catching_up) >= MAX_CATCHING_UP or self.draining:
            return
        self._waiting.add(owner)
        task = asyncio.create_task(self._catch_up(owner))
        self._catching_up.add(task)
        task.add_done_callback(self._catching_up.discard)

    async def _catch_up(self, owner: Owner) -> None:
        try:
            async with self._lock(owner):
                self._waiting.discard(owner)  # before the log is read: what is kept from here on needs another turn
                await self._in_thread(self.states.catch_up, owner)
        except Exception:  # the events are safe; the next answer tries again
            logger.exception("a state could not catch up with the event log")
            self.store.drop(owner)

    def _lock(self, owner: Owner) -> asyncio.Lock:
        """Return the user's lock; it lives as long as someone holds or awaits it."""
        lock = self._locks.get(owner)
        if lock is None:
            lock = self._locks[owner] = asyncio.Lock()
        return lock

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))


def _new_event(event: EventMessage) -> NewEvent:
    return NewEvent(event.item_id, event.timestamp, event.event_id, event.event_type, event.value)
