"""The story of one request, without HTTP: events go to the log, states follow the log, answers come from states.

*Events*: what cannot be kept is rejected one by one; the rest is committed by the event log, and only then answered.
Afterwards, in the background, a state that is held catches up.

*Questions*: under the user's lock the state is brought up to the log (an append, a replay, or a rebuild), then the
lock is let go, for states are values, and the model answers in a worker thread, many users at once. So an answer
knows every event that was acknowledged before the question came; where that would take long it says `degraded`, and
the work is done in the background.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from msgspec import UNSET, UnsetType

from ksa_serving import admission
from ksa_serving.batcher import Batcher
from ksa_serving.errors import DeadlineError, InvalidRequestError, OverloadedError, UnknownEventError
from ksa_serving.event_log import AppendResult, EventLog, Outcome
from ksa_serving.events import NewEvent, Owner, StoredEvent
from ksa_serving.messages import (
    ChunkExplanation,
    EventMessage,
    EventResult,
    EventsAnswer,
    EventsBatchAnswer,
    EventsBatchRequest,
    EventsRequest,
    ExplainAnswer,
    ExplainRequest,
    ForgottenAnswer,
    HistoryAnswer,
    ItemsAnswer,
    ItemScore,
    ItemTitle,
    KeptEvent,
    RecommendAnswer,
    RecommendBatchAnswer,
    RecommendBatchRequest,
    RecommendRequest,
    ReleaseInfo,
    ReleasesAnswer,
    ScoreAnswer,
    ScoredItem,
    ScoreRequest,
    StateAnswer,
    StateSource,
)
from ksa_serving.metrics import Metrics
from ksa_serving.models import Model, Question
from ksa_serving.release import Release
from ksa_serving.releases import Releases, Served
from ksa_serving.settings import ServeSettings
from ksa_serving.state_store import StateRecord, StateStore
from ksa_serving.user_states import UserStates

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_CATCHING_UP = 4
"""Users whose states may wait to catch up in the background; others catch up when next asked for, then in one step.
Few: an event at a time costs the model as much as many at once, and under load answers need the cores."""
MAX_SETTLING = 1024
"""Users whose states may wait to be computed at length."""
RESULTS: dict[Outcome, EventResult] = {
    "accepted": EventResult("accepted"),
    "late": EventResult("late-applied"),
    "late-far": EventResult("late-queued"),
    "duplicate": EventResult("duplicate"),
    "conflict": EventResult("rejected", "conflict"),
    "unknown": EventResult("rejected", "unknown-event"),
}


@dataclass(frozen=True)
class Context:
    """What a request brings beside its body: whose users it means, and until when its work may begin."""

    tenant: str = ""
    deadline: float | None = None
    """On `time.monotonic`'s clock; None: as the settings say."""


@dataclass(frozen=True)
class _Found:
    """A user's state for one request, and how it was had."""

    served: Served
    record: StateRecord
    source: StateSource
    seq: int
    stale: bool
    deadline: float


class Service:
    """One process's service. Its methods run on one event loop.

    Args:
        release: what is served first.
        log: the event log; the service closes it.
        store: where states are held; the service closes it.
        clock: seconds since 1970; for the future check and missing request times.
        models: filled with the model of each state fingerprint in use; a cold store reads it.
        releases: folder of further runs that may be loaded.
        index: how their items are searched.
    """

    def __init__(
        self,
        release: Release,
        log: EventLog,
        store: StateStore,
        settings: ServeSettings | None = None,
        clock: Callable[[], float] = time.time,
        models: dict[str, Model] | None = None,
        releases: Path | None = None,
        index: Literal["exact", "ivf"] = "exact",
    ):
        self.log = log
        self.store = store
        self.settings = settings or ServeSettings()
        self.metrics = Metrics()
        self.draining = False
        self._clock = clock
        self._models = {} if models is None else models
        self._locks: WeakValueDictionary[Owner, asyncio.Lock] = WeakValueDictionary()
        self._waiting: set[Owner] = set()
        self._settling: set[Owner] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(self.settings.model_threads, thread_name_prefix="model")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="slow")
        self._changing = asyncio.Lock()
        self._purging: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._auditing = False
        self.releases = Releases(release, releases, self._prepare, index)
        self.served = self.releases.active
        log.on_commit = self._on_commit
        self.metrics.watch(self)

    @property
    def release(self) -> Release:
        """The active release."""
        return self.served.release

    @property
    def states(self) -> UserStates:
        """The active release's states."""
        return self.served.states

    @property
    def num_settling(self) -> int:
        """Users whose states are computed in the background."""
        return len(self._settling)

    # -- events -----------------------------------------------------------------------------------------------

    async def post_events(self, user_id: str, request: EventsRequest, context: Context | None = None) -> EventsAnswer:
        """Keep events; return when they are on disk.

        Raises:
            InvalidRequestError: the user id or the number of events is out of its limits.
            OverloadedError, EventLogError: nothing was kept; the call can be sent again.
        """
        owner = self._owner(user_id, context)
        admission.check_num_events(len(request.events), self.settings.limits)
        self._check_deadline(context)
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
        return self._counted([result for result in results if result is not None], seq)

    async def post_events_batch(self, request: EventsBatchRequest, context: Context | None = None) -> EventsBatchAnswer:
        """Keep events of several users; each user's are kept whole or not at all.

        Raises:
            InvalidRequestError: too many users or events, or a user id out of its limits: nothing was kept.
        """
        admission.check_num_users(len(request.users), self.settings.limits)
        admission.check_num_events(sum(len(user.events) for user in request.users), self.settings.limits)
        for user in request.users:
            self._owner(user.user_id, context)
        calls = [self.post_events(user.user_id, EventsRequest(user.events), context) for user in request.users]
        return EventsBatchAnswer(list(await asyncio.gather(*calls)))

    async def correct_event(
        self, user_id: str, event_id: str, event: EventMessage, context: Context | None = None
    ) -> EventsAnswer:
        """Put a payload in place of the one kept under `event_id`; kept as new where there is none."""
        owner = self._owner(user_id, context)
        if event.event_id not in (None, event_id):
            raise InvalidRequestError("event_id: expected the one of the path, or none, got another.", "contradiction")
        new = NewEvent(event.item_id, event.timestamp, event_id, event.event_type, event.value)
        rejection = self._rejection(
            EventMessage(event.item_id, event.timestamp, event_id, event.event_type, event.value)
        )
        if rejection is not None:
            head = await self._in_thread(self.log.head, owner)
            return self._counted([rejection], head.last_seq)
        return await self._changed(owner, await asyncio.wrap_future(self.log.correct(owner, new)))

    async def retract_event(self, user_id: str, event_id: str, context: Context | None = None) -> EventsAnswer:
        """Take an event back.

        Raises:
            UnknownEventError: the log has none of this id.
        """
        owner = self._owner(user_id, context)
        result = await asyncio.wrap_future(self.log.retract(owner, event_id))
        if result.outcomes == ["unknown"]:
            raise UnknownEventError("event: expected one that was kept, got another id.")
        return await self._changed(owner, result)

    async def forget(self, user_id: str, context: Context | None = None) -> ForgottenAnswer:
        """Delete a user: at once for every later request, from the disks within a minute."""
        owner = self._owner(user_id, context)
        async with self._lock(owner):  # so that no state of the old generation is put after it was dropped
            num_events = await asyncio.wrap_future(self.log.forget(owner))
            await self._in_thread(self.store.drop, owner)
        self.metrics.forgotten.inc()
        if self._purging is None or self._purging.done():
            self._purging = self._task(self._purge())
        return ForgottenAnswer(num_events, ["log", "memory", "cold"])

    async def history(
        self, user_id: str, limit: int = 1000, before: int | None = None, context: Context | None = None
    ) -> HistoryAnswer:
        """Return the newest events of a user, or those before index `before`, in order."""
        owner = self._owner(user_id, context)
        if not 1 <= limit <= 10_000:
            raise InvalidRequestError(f"limit: expected 1 to 10000, got {limit}.", "invalid-limit")
        model = self.served.release.model

        def read() -> HistoryAnswer:
            with self.log.view(owner) as view:
                end = view.head.num_events if before is None else max(0, min(before, view.head.num_events))
                first = max(0, end - limit)
                events = view.between(first, end - 1) if end else []
                return HistoryAnswer(
                    events=_kept(model, first, events),
                    num_events=view.head.num_events,
                    seq=view.head.last_seq,
                    chunk_size=model.chunk_size,
                    window_chunks=model.window_chunks,
                )

        return await self._in_thread(read)

    # -- questions --------------------------------------------------------------------------------------------

    async def recommend(
        self, user_id: str, request: RecommendRequest, context: Context | None = None
    ) -> RecommendAnswer:
        """Answer "what next?" from the user's events, those of the request, or none.

        Raises:
            InvalidRequestError: a value is out of range.
            DeadlineError: it passed before the work began.
            EventLogError: the user's events cannot be read.
        """
        owner = self._owner(user_id, context)
        now = self._clock()
        admission.check_recommend(request, self.settings.limits, self.release.clock, now)
        request_time = self._request_time(request.request_time, now)
        found = await self._find(owner, request.min_seq, context)
        record = found.record
        if request.events:
            given = [_new_event(event) for event in request.events]
            record = await self._in_thread(found.served.states.with_events, record, given)
        question = Question(
            state=record.state,
            k=request.k,
            request_time=request_time,
            exclude_seen={"all": request.exclude_seen, "again": False, "new": True}[request.which],
            only_seen=request.which == "again",
            allow=None if request.allow is None else frozenset(request.allow),
            deny=frozenset(request.deny),
        )
        scored = await found.served.batcher.ask(question, found.deadline)
        items = [ScoredItem(item_id, float(score)) for item_id, score in scored]
        return RecommendAnswer(items=items, **self._provenance(found, record, request_time))

    async def recommend_batch(
        self, request: RecommendBatchRequest, context: Context | None = None
    ) -> RecommendBatchAnswer:
        """Answer one question about several users; the model answers them together."""
        admission.check_num_users(len(request.user_ids), self.settings.limits)
        single = RecommendRequest(
            k=request.k,
            request_time=request.request_time,
            exclude_seen=request.exclude_seen,
            which=request.which,
            allow=request.allow,
            deny=request.deny,
        )
        answers = await asyncio.gather(*(self.recommend(user_id, single, context) for user_id in request.user_ids))
        return RecommendBatchAnswer(list(answers))

    async def score(self, user_id: str, request: ScoreRequest, context: Context | None = None) -> ScoreAnswer:
        """Score given items."""
        owner = self._owner(user_id, context)
        now = self._clock()
        admission.check_candidates("item_ids", request.item_ids, self.settings.limits)
        admission.check_request_time(request.request_time, self.release.clock)
        request_time = self._request_time(request.request_time, now)
        found = await self._find(owner, request.min_seq, context)
        model = found.served.release.model
        scores = await self._in_thread(model.score, found.record.state, request.item_ids, request_time)
        return ScoreAnswer(
            scores=[ItemScore(item, score) for item, score in zip(request.item_ids, scores)],
            **self._provenance(found, found.record, request_time),
        )

    async def explain(self, user_id: str, request: ExplainRequest, context: Context | None = None) -> ExplainAnswer:
        """Tell which periods and events carried an item's score.

        Raises:
            InvalidRequestError: the model does not know the item.
            OverloadedError: the user's state is still being computed.
        """
        owner = self._owner(user_id, context)
        now = self._clock()
        admission.check_explain(request, self.settings.limits)
        admission.check_request_time(request.request_time, self.release.clock)
        request_time = self._request_time(request.request_time, now)
        found = await self._find(owner, request.min_seq, context)
        if found.source == "degraded":
            raise OverloadedError("explain: the user's state is still being computed. Try again in some seconds.")
        return await self._in_thread(self._explained, owner, found, request, request_time)

    async def state(self, user_id: str, context: Context | None = None) -> StateAnswer:
        """Tell what is kept of a user; builds nothing."""
        owner = self._owner(user_id, context)
        served = self.served
        head = await self._in_thread(self.log.head, owner)
        record = await self._in_thread(served.states.held, owner)
        return StateAnswer(
            num_events=head.num_events,
            seq=head.last_seq,
            state_source="none" if record is None else "store" if record.cold else "host",
            state_seq=0 if record is None else record.seq,
            nbytes=0 if record is None else record.state.nbytes,
            seen_nbytes=0 if record is None else record.state.seen_nbytes,
            fixed_nbytes=0 if record is None else record.state.fixed_nbytes,
            model_version=served.release.model_version,
            index_version=served.release.index_version,
            state_fingerprint=served.release.state_fingerprint,
        )

    async def find_items(self, text: str, most: int) -> ItemsAnswer:
        """Return items whose id or title has `text` in it."""
        if not 1 <= most <= 100:
            raise InvalidRequestError(f"most: expected 1 to 100, got {most}.", "invalid-limit")
        model = self.release.model
        found = await self._in_thread(model.find_items, text, most)
        return ItemsAnswer([ItemTitle(item, model.title(item)) for item in found])

    def titles(self, item_ids: Sequence[str]) -> ItemsAnswer:
        """Return what people call items."""
        admission.check_candidates("item_ids", item_ids, self.settings.limits)
        return ItemsAnswer([ItemTitle(item, self.release.model.title(item)) for item in item_ids])

    # -- releases ---------------------------------------------------------------------------------------------

    async def load_release(self, run: str) -> ReleasesAnswer:
        """Load a run and make the states of the last active users ready; what is served goes on."""
        async with self._changing:
            loop = asyncio.get_running_loop()
            served = await loop.run_in_executor(self._slow, self.releases.load, run)
            await loop.run_in_executor(self._slow, self._warm, served)
            return self.list_releases()

    async def activate_release(self, run: str) -> ReleasesAnswer:
        """Serve a loaded release from the next request on."""
        async with self._changing:
            old = self.releases.fingerprints()
            self.served = self.releases.activate(run)
            await self._retire(old)
            return self.list_releases()

    async def roll_back(self) -> ReleasesAnswer:
        """Serve the previous release again from the next request on."""
        async with self._changing:
            self.served = self.releases.roll_back()
            return self.list_releases()

    def list_releases(self) -> ReleasesAnswer:
        """Return all releases loaded."""
        held = [("active", self.releases.active), ("previous", self.releases.previous)]
        held += [("loaded", served) for served in self.releases.loaded.values()]
        return ReleasesAnswer([_release_info(role, served) for role, served in held if served], self.draining)

    def unready(self) -> str | None:
        """Return why no requests should come here, or None."""
        if self.draining:
            return "draining"
        if self.log.healthy:
            return None
        self.log.probe()
        return "event log cannot be written"

    async def close(self) -> None:
        """Let background work end, write what waits, close log and store."""
        self.draining = True
        self._closing.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.log.close)
        await asyncio.to_thread(self.store.close)
        self._threads.shutdown()
        self._slow.shutdown()

    # -- helpers ----------------------------------------------------------------------------------------------

    def _prepare(self, release: Release) -> Served:
        settings = self.settings
        self._models.setdefault(release.state_fingerprint, release.model)
        states = UserStates(release, self.log, self.store, settings.rebuild_step_events, settings.inline_events)
        batcher = Batcher(release.model, self._threads, settings.batch_questions, self._on_batch)
        return Served(release, states, batcher)

    def _warm(self, served: Served) -> None:
        """Make states ready in a release that is not active yet, the last active users' first."""
        records = getattr(getattr(self.store, "memory", self.store), "records", list)()
        seen: set[Owner] = set()
        for record in reversed(records):
            if len(seen) >= self.settings.warm_users or self.draining:
                return
            if record.owner not in seen:
                seen.add(record.owner)
                served.states.current(record.owner)

    async def _retire(self, before: set[str]) -> None:
        for fingerprint in before - self.releases.fingerprints():
            await self._in_thread(self.store.retire, fingerprint)
            self._models.pop(fingerprint, None)

    async def _find(self, owner: Owner, min_seq: int, context: Context | None) -> _Found:
        """Return the user's state, brought up to the log."""
        deadline = self._check_deadline(context)
        served = self.served
        stale = not await self._reached(owner, min_seq, deadline)
        if stale:  # waited in vain; the answer without it is still wanted
            deadline = max(deadline, time.monotonic() + 1.0)
        lock = self._lock(owner)
        async with lock:
            if time.monotonic() > deadline:
                raise DeadlineError("deadline: it passed while the request waited.")
            record, source = await self._in_thread(served.states.current, owner)
        if source == "degraded":
            self._settle_later(served, owner)
            return _Found(
                served, record, source, (await self._in_thread(self.log.head, owner)).last_seq, stale, deadline
            )
        if source == "host" and random.random() < self.settings.audit_share and not self._auditing:
            self._auditing = True
            self._task(self._audit(served, record))
        return _Found(served, record, source, record.seq, stale, deadline)

    async def _reached(self, owner: Owner, min_seq: int, deadline: float) -> bool:
        """Wait until the log holds `min_seq` of this user; return False if it did not before the deadline."""
        wait = 0.002
        while min_seq and (await self._in_thread(self.log.head, owner)).last_seq < min_seq:
            if time.monotonic() + 2 * wait > deadline:
                return False
            await asyncio.sleep(wait)
            wait = min(0.05, 2 * wait)
        return True

    def _check_deadline(self, context: Context | None) -> float:
        now = time.monotonic()
        if context is None or context.deadline is None:
            return now + self.settings.deadline_seconds
        if context.deadline < now:
            raise DeadlineError("deadline: it passed before the request's work began.")
        return context.deadline

    def _explained(
        self, owner: Owner, found: _Found, request: ExplainRequest, request_time: int | None
    ) -> ExplainAnswer:
        model, state = found.served.release.model, found.record.state
        reasons = model.explain(state, request.item_id, request_time, request.chunks)
        (score,) = model.score(state, [request.item_id], request_time)
        (alone,) = model.score(model.with_own_items(state, None, []), [request.item_id], request_time)
        chunks: list[ChunkExplanation] = []
        with self.log.view(owner) as view:
            for reason in reasons[: request.chunks]:
                events = view.between(reason.first, reason.last)
                if not events:  # deleted since
                    continue
                chunks.append(
                    ChunkExplanation(
                        chunk=reason.first // model.chunk_size,
                        seen_as="summary" if reason.seen_as == "summary" else "events",
                        attention=reason.attention,
                        score_change=reason.score_change,
                        first_time=events[0].timestamp,
                        last_time=events[-1].timestamp,
                        events=_kept(model, reason.first, events),
                    )
                )
        return ExplainAnswer(
            item_id=request.item_id,
            score=score or 0.0,
            own_item_bias=(score or 0.0) - (alone or 0.0),
            summary_attention=sum(reason.attention for reason in reasons if reason.seen_as == "summary"),
            chunks=chunks,
            **self._provenance(found, found.record, request_time),
        )

    def _provenance(self, found: _Found, record: StateRecord, request_time: int | None) -> dict[str, Any]:
        release = found.served.release
        longest = release.longest_trained_history
        return {
            "num_events": record.num_events,
            "model_version": release.model_version,
            "index_version": release.index_version,
            "seq": found.seq,
            "state_seq": found.record.seq,
            "state_source": found.source,
            "request_time": request_time,
            "beyond_trained_length": longest is not None and record.num_events > longest,
            "degraded": found.source == "degraded",
            "stale": found.stale,
        }

    def _request_time(self, given: int | UnsetType | None, now: float) -> int | None:
        if given is UNSET:
            return int(now) if self.release.clock == "unix" else None
        return given if isinstance(given, int) else None

    def _owner(self, user_id: str, context: Context | None) -> Owner:
        admission.check_user_id(user_id, self.settings.limits)
        return Owner(user_id, "" if context is None else context.tenant)

    def _rejection(self, event: EventMessage) -> EventResult | None:
        fault = admission.event_fault(event, self.settings.limits, self.release.clock, self._clock())
        return None if fault is None else EventResult("rejected", fault)

    async def _changed(self, owner: Owner, result: AppendResult) -> EventsAnswer:
        """Answer a change of what was kept before."""
        self._catch_up_later(owner)
        seq = (await self._in_thread(self.log.head, owner)).last_seq
        return self._counted([RESULTS[outcome] for outcome in result.outcomes], seq)

    def _counted(self, results: list[EventResult], seq: int) -> EventsAnswer:
        for result in results:
            self.metrics.events.labels(result.status).inc()
        return EventsAnswer(results, seq)

    def _on_commit(self, seconds: float, num_calls: int) -> None:
        self.metrics.commit.observe(seconds)
        self.metrics.commit_calls.observe(num_calls)

    def _on_batch(self, size: int, waited: float) -> None:
        self.metrics.batch_size.observe(size)
        self.metrics.batch_wait.observe(waited)

    def _catch_up_later(self, owner: Owner) -> None:
        """Bring a held state up to the log in the background; calls for one user that still waits are one."""
        if owner in self._waiting or len(self._waiting) >= MAX_CATCHING_UP or self.draining:
            return
        self._waiting.add(owner)
        self._task(self._catch_up(owner))

    async def _catch_up(self, owner: Owner) -> None:
        try:
            async with self._lock(owner):
                self._waiting.discard(owner)  # before the log is read: what is kept from here on needs another turn
                await self._in_thread(self.states.catch_up, owner)
        except Exception:  # the events are safe; the next answer tries again
            logger.exception("a state could not catch up with the event log")
            self.store.drop(owner)

    def _settle_later(self, served: Served, owner: Owner) -> None:
        """Compute a state at length in the background, one user after the other."""
        if owner not in self._settling and len(self._settling) < MAX_SETTLING and not self.draining:
            self._settling.add(owner)
            self._task(self._settle(served, owner))

    async def _settle(self, served: Served, owner: Owner) -> None:
        try:
            loop = asyncio.get_running_loop()
            # Not under the user's lock: answers go on meanwhile, and a record never replaces one that knows more.
            record = await loop.run_in_executor(self._slow, served.states.settle, owner)
            if (await self._in_thread(self.log.head, owner)).generation != record.generation:
                self.store.drop(owner)
        except Exception:
            logger.exception("a state could not be computed in the background")
        finally:
            self._settling.discard(owner)

    async def _audit(self, served: Served, record: StateRecord) -> None:
        """Compute a state anew and compare; one that differs is dropped, counted, and told loudly."""
        try:
            loop = asyncio.get_running_loop()
            difference = await loop.run_in_executor(self._slow, served.states.audit, record)
            if difference is None:
                return
            equal = difference <= self.settings.audit_tolerance
            self.metrics.audits.labels("equal" if equal else "different").inc()
            if not equal:
                logger.error("audit: a state differs from its log by %.1e; it is dropped", difference)
                await self._in_thread(self.store.drop, record.owner)
        finally:
            self._auditing = False

    async def _purge(self) -> None:
        """Have what was deleted overwritten; try again until nothing of it is left."""
        loop, wait = asyncio.get_running_loop(), self.settings.purge_after_seconds
        while True:
            with contextlib.suppress(TimeoutError):  # deletions that come together are purged together
                await asyncio.wait_for(self._closing.wait(), wait)
            if await loop.run_in_executor(self._slow, self.store.purge) or self._closing.is_set():
                return
            wait = 1.0

    def _task(self, work: Any) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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


def _kept(model: Model, first: int, events: Sequence[StoredEvent]) -> list[KeptEvent]:
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


def _release_info(role: Any, served: Served) -> ReleaseInfo:
    release = served.release
    return ReleaseInfo(release.model_version, release.index_version, release.state_fingerprint, release.name, role)
