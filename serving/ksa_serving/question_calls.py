"""Calls that are answered from a user's state: recommend, score, explain, state; and what items are called.

The state is brought up to the log under the user's lock; then the lock is let go, for states are values, and the model
answers in a worker thread, many users at once. So an answer knows every event that was acknowledged before the
question came; where that would take long it says `degraded`, and the work is done in the background.
"""

import asyncio
from collections.abc import Callable, Sequence

from msgspec import UNSET, UnsetType, structs

from ksa_serving import admission
from ksa_serving.context import NOBODY, Context
from ksa_serving.errors import InvalidRequestError, OverloadedError
from ksa_serving.event_calls import kept_events, new_event
from ksa_serving.event_log import EventLog
from ksa_serving.events import Owner, StoredEvent
from ksa_serving.messages import (
    ChunkExplanation,
    ExplainAnswer,
    ExplainRequest,
    ItemsAnswer,
    ItemScore,
    ItemTitle,
    RecommendAnswer,
    RecommendBatchAnswer,
    RecommendBatchRequest,
    RecommendRequest,
    ScoreAnswer,
    ScoredItem,
    ScoreRequest,
    StateAnswer,
)
from ksa_serving.models import ChunkReason, Model, Question
from ksa_serving.releases import Releases
from ksa_serving.settings import ServeSettings
from ksa_serving.state_finder import Found, StateFinder
from ksa_serving.state_store import StateRecord
from ksa_serving.user_view import UserView
from ksa_serving.workers import Workers

MOST_FOUND = 100
"""Items in one answer to a search by text."""


class QuestionCalls:
    """One service's questions. They run on one event loop."""

    def __init__(
        self,
        log: EventLog,
        releases: Releases,
        finder: StateFinder,
        workers: Workers,
        settings: ServeSettings,
        clock: Callable[[], float],
    ):
        self._log = log
        self._releases = releases
        self._finder = finder
        self._workers = workers
        self._limits = settings.limits
        self._clock = clock

    async def recommend(self, user_id: str, request: RecommendRequest, context: Context = NOBODY) -> RecommendAnswer:
        """Answer "what next?" from the user's events, those of the request, or none.

        Raises:
            InvalidRequestError: a value is out of range.
            DeadlineError: it passed before the work began.
            EventLogError: the user's events cannot be read.
        """
        owner = context.owner(user_id, self._limits)
        admission.check_recommend(request, self._limits, self._releases.active.release.clock, self._clock())
        request_time = self._request_time(request.request_time)
        found = await self._finder.find(owner, request.min_seq, context)
        record = found.record
        if request.events:
            given = [new_event(event) for event in request.events]
            record = await self._workers.run(found.served.states.with_events, record, given)
        scored = await found.served.answer(_question(request, record.state, request_time), found.deadline)
        items = [ScoredItem(item_id, float(score)) for item_id, score in scored]
        return RecommendAnswer(items=items, **found.provenance(record.num_events, request_time))

    async def recommend_batch(self, request: RecommendBatchRequest, context: Context = NOBODY) -> RecommendBatchAnswer:
        """Answer one question about several users; the model answers them together."""
        admission.check_num_users(len(request.user_ids), self._limits)
        admission.check_told_users(request.users, len(request.user_ids))
        single = RecommendRequest(
            k=request.k,
            request_time=request.request_time,
            exclude_seen=request.exclude_seen,
            which=request.which,
            allow=request.allow,
            deny=request.deny,
        )
        told = request.users or [single.user] * len(request.user_ids)
        asked = (
            self.recommend(user_id, structs.replace(single, user=user), context)
            for user_id, user in zip(request.user_ids, told)
        )
        return RecommendBatchAnswer(list(await asyncio.gather(*asked)))

    async def score(self, user_id: str, request: ScoreRequest, context: Context = NOBODY) -> ScoreAnswer:
        """Score given items."""
        owner = context.owner(user_id, self._limits)
        admission.check_candidates("item_ids", request.item_ids, self._limits)
        admission.check_request_time(request.request_time, self._releases.active.release.clock)
        request_time = self._request_time(request.request_time)
        found = await self._finder.find(owner, request.min_seq, context)
        model = found.served.release.model
        scores = await self._workers.run(model.score, found.record.state, request.item_ids, request_time, request.user)
        return ScoreAnswer(
            scores=[ItemScore(item, score) for item, score in zip(request.item_ids, scores)],
            **found.provenance(found.record.num_events, request_time),
        )

    async def explain(self, user_id: str, request: ExplainRequest, context: Context = NOBODY) -> ExplainAnswer:
        """Tell which periods and events carried an item's score.

        Raises:
            InvalidRequestError: the model does not know the item.
            OverloadedError: the user's state is still being computed.
        """
        owner = context.owner(user_id, self._limits)
        admission.check_explain(request, self._limits)
        admission.check_request_time(request.request_time, self._releases.active.release.clock)
        request_time = self._request_time(request.request_time)
        found = await self._finder.find(owner, request.min_seq, context)
        if found.source == "degraded":
            raise OverloadedError("explain: the user's state is still being computed. Try again in some seconds.")
        return await self._workers.run_alone(self._explained, owner, found, request, request_time)

    async def state(self, user_id: str, context: Context = NOBODY) -> StateAnswer:
        """Tell what is kept of a user; builds nothing."""
        owner = context.owner(user_id, self._limits)
        served = self._releases.active
        head = await self._workers.run(self._log.head, owner)
        record = await self._workers.run(served.states.held, owner)
        return StateAnswer(
            num_events=head.num_events,
            seq=head.last_seq,
            state_source="none" if record is None else "store" if record.cold else served.release.model.tier,
            state_seq=0 if record is None else record.seq,
            state_parity="exact" if record is None else record.parity,
            nbytes=0 if record is None else record.state.nbytes,
            seen_nbytes=0 if record is None else record.state.seen_nbytes,
            fixed_nbytes=0 if record is None else record.state.fixed_nbytes,
            model_version=served.release.model_version,
            index_version=served.release.index_version,
            state_fingerprint=served.release.state_fingerprint,
        )

    async def find_items(self, text: str, most: int) -> ItemsAnswer:
        """Return items whose id or title has `text` in it."""
        if not 1 <= most <= MOST_FOUND:
            raise InvalidRequestError(f"most: expected 1 to {MOST_FOUND}, got {most}.", "invalid-limit")
        model = self._releases.active.release.model
        found = await self._workers.run(model.find_items, text, most)
        return ItemsAnswer([ItemTitle(item, model.title(item)) for item in found])

    def titles(self, item_ids: Sequence[str]) -> ItemsAnswer:
        """Return what people call items."""
        admission.check_candidates("item_ids", item_ids, self._limits)
        model = self._releases.active.release.model
        return ItemsAnswer([ItemTitle(item, model.title(item)) for item in item_ids])

    def _request_time(self, given: int | UnsetType | None) -> int | None:
        if given is UNSET:
            return int(self._clock()) if self._releases.active.release.clock == "unix" else None
        return given if isinstance(given, int) else None

    def _explained(
        self, owner: Owner, found: Found, request: ExplainRequest, request_time: int | None
    ) -> ExplainAnswer:
        model, state = found.served.release.model, found.record.state
        item, user = request.item_id, request.user
        own_item_bias = model.own_item_bias(state, item, request_time)
        with self._log.view(owner) as view:
            newest = self._newest(view, found.record, model.num_newest)
            met = [] if own_item_bias is None else view.meetings(item)
        met = [meeting for meeting in met if meeting.place < state.num_events]
        reasons = model.explain(state, newest, met, item, request_time, request.chunks, user)
        (score,) = model.score(state, [item], request_time, user)
        return ExplainAnswer(
            item_id=item,
            score=score or 0.0,
            own_item_bias=own_item_bias or 0.0,
            summary_attention=sum(reason.attention for reason in reasons if reason.seen_as == "summary"),
            chunks=self._dated(owner, model, reasons[: request.chunks]),
            **found.provenance(found.record.num_events, request_time),
        )

    def _newest(self, view: UserView, record: StateRecord, count: int) -> list[StoredEvent]:
        """Return a record's last events.

        Raises:
            OverloadedError: they were retracted meanwhile, or others came before them.
        """
        since = view.head.num_events - record.num_events
        events = view.newest(min(view.head.num_events, count + max(0, since)))
        newest = events[: len(events) - since] if since >= 0 else []
        if [event.order(self._log.tie) for event in newest[-1:]] != ([record.last_order] if record.num_events else []):
            raise OverloadedError("explain: the user's events changed meanwhile. Try again.")
        return newest

    def _dated(self, owner: Owner, model: Model, reasons: Sequence[ChunkReason]) -> list[ChunkExplanation]:
        """Return chunks with their dates and events; those whose events were deleted meanwhile are left out."""
        with self._log.view(owner) as view:
            found = list(zip(reasons, view.spans([(reason.first, reason.last) for reason in reasons])))
        return [
            ChunkExplanation(
                chunk=reason.first // model.chunk_size,
                seen_as=reason.seen_as,
                attention=reason.attention,
                attention_by_layer=reason.attention_by_layer,
                score_change=reason.score_change,
                own_item_change=reason.own_item_change,
                first_time=events[0].timestamp,
                last_time=events[-1].timestamp,
                events=kept_events(model, reason.first, events),
            )
            for reason, events in found
            if events
        ]


def _question(request: RecommendRequest, state: object, request_time: int | None) -> Question:
    return Question(
        state=state,
        k=request.k,
        request_time=request_time,
        exclude_seen={"all": request.exclude_seen, "again": False, "new": True}[request.which],
        only_seen=request.which == "again",
        allow=None if request.allow is None else frozenset(request.allow),
        deny=frozenset(request.deny),
        user=request.user,
    )
