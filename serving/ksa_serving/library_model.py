"""`Model` answered by `recsys_ksa.Recommender`. Importing this imports torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksa_serving.attribution import explain
from ksa_serving.errors import InvalidRequestError, OverloadedError
from ksa_serving.events import Meeting, StoredEvent
from ksa_serving.messages import Parity, StateTier
from ksa_serving.models import ChunkReason, Mark, Question, Scored, StateParts, Vocabulary
from ksa_serving.ranking import rank_items
from ksa_serving.state_bytes import StateBytes, num_summary_rows
from recsys_ksa.errors import DataError, OutOfOrderError, PoolFullError, StateError
from recsys_ksa.events import Event, roll_history
from recsys_ksa.features.sessions import NO_PLACE
from recsys_ksa.model.append import append_events, replay, replay_start
from recsys_ksa.model.fingerprint import appended_hash
from recsys_ksa.model.seen import SeenItems
from recsys_ksa.model.state import LayerState, Memory, SharedRows, UserMemory, UserState, first_visible_chunk
from recsys_ksa.order import order_key
from recsys_ksa.recommender import Recommender
from recsys_ksa.schema import UNKNOWN_ITEM

REBUILT_EVENTS = 1024
"""Events of the history by which a model is warmed up: more than are appended in pages."""


class LibraryModel:
    """One loaded run. Safe to share between threads."""

    def __init__(self, recommender: Recommender, cold_parity: Parity = "exact"):
        self.recommender = recommender
        self.cold_parity: Parity = cold_parity
        self.tier: StateTier = "host" if recommender.network.start.device.type == "cpu" else "gpu"
        self._config = recommender.network.config
        self.chunk_size = self._config.chunk_size
        self.window_chunks = self._config.window_chunks
        info = recommender.run.info
        self._num_base_items = info.num_base_items or info.num_items
        self.vocabulary = Vocabulary(info.num_items, self._appended(info.num_items))
        self._by_id = recommender.run.info.tie == "id"
        self._by_value = bool(recommender.event_features.value_edges)
        self.num_newest = 2 + recommender.event_features.events_before
        self._bytes = StateBytes(recommender, cold_parity)
        # On an accelerator threads that launch at once only take Python from each other.
        self._one_pass: AbstractContextManager[object] = nullcontext() if recommender.pool is None else Lock()

    def warm_up(self, most_questions: int) -> None:
        """Compile and record what an accelerator runs, so that nobody waits for it: batches of up to so many users."""
        pool = self.recommender.pool
        if pool is None:
            return
        if pool.recorder is not None:
            pool.recorder.warm_up(most_questions)
        item = next(name for name in self.recommender.run.items.item_id if name is not None)
        state = self.new_state()
        events = [StoredEvent(n, item, n, None, None, None) for n in range(REBUILT_EVENTS + 1)]
        for given in (events[:-1], events[-1:]):  # as a rebuild reads them, and as they come
            state = self.append(state, given)
        self.recommend([Question(state, 1, None, exclude_seen=hidden) for hidden in (True, False)])

    # -- states -----------------------------------------------------------------------------------------------

    def new_state(self) -> UserState:
        """Return the state of a user without events."""
        return self.recommender.new_state()

    def append(self, state: UserState, events: Sequence[StoredEvent]) -> UserState:
        """Return `state` with events appended."""
        types = [event.event_type for event in events]
        with self._one_pass, _full_pool_refused():
            return self.recommender.append(
                state,
                [event.item_id for event in events],
                [event.timestamp for event in events],
                types if any(kind is not None for kind in types) else None,
                features={"value": [event.value for event in events]} if self._by_value else None,
                event_ids=[event.event_id for event in events] if self._by_id else None,
            )

    def append_batch(self, states: Sequence[UserState], events: Sequence[Sequence[StoredEvent]]) -> list[UserState]:
        """Return each state with its events, in order and all after it, appended in one pass."""
        counts = [len(given) for given in events]
        items, times = self._rows(flat := [event for given in events for event in given])
        network, impl, pool = self.recommender.network, self.recommender.attention_impl, self.recommender.pool
        with self._one_pass, _full_pool_refused():
            arrivals, places = self.recommender.arrivals(
                flat,
                items,
                times,
                counts,
                [state.last_timestamp for state in states],
                [state.session_place for state in states],
            )
            memories = append_events(network, [state.memory for state in states], arrivals, impl, pool)
        spans = [slice(*span) for span in pairwise(accumulate(counts, initial=0))]
        return [
            self._after(state, memory, given, items[span], times[span], place)
            for state, memory, given, span, place in zip(states, memories, events, spans, places.tolist())
        ]

    def replay_start(self, num_events: int) -> int:
        """Return the first event needed to rebuild the window's rows from summaries."""
        return max(0, replay_start(self._config, num_events) - self.recommender.event_features.events_before)

    def rewind(
        self, state: UserState, num_events: int, first: int, events: Sequence[StoredEvent], mark: Mark
    ) -> UserState:
        """Return the state of the first `num_events` events; its own items are unset."""
        if num_events == 0:
            return self.new_state()
        if first_visible_chunk(self._config, state.num_events):
            raise StateError("rewind: expected every summary to be kept, got a state cut by max_visible_chunks.")
        start = replay_start(self._config, num_events)
        assert len(events) == num_events - first
        assert first <= max(0, start - 1)
        before = None if start == 0 else events[start - 1 - first].timestamp
        given = events[start - first :]
        place = self._session_place(events[: start - first])
        arrivals, places = self.recommender.arrivals(given, *self._rows(given), [len(given)], [before], [place])
        stored = Memory(num_events, tuple(self._cut(layer, num_events) for layer in state.memory.layers), _no_input)
        network, impl, pool = self.recommender.network, self.recommender.attention_impl, self.recommender.pool
        with self._one_pass, _full_pool_refused():
            memory: UserMemory = replay(network, stored, arrivals, impl)
            if pool is not None:
                memory = pool.hold(memory)
        return UserState(
            memory=memory,
            last_key=self._key(events[-1], num_events - 1),
            seen=SeenItems.empty(),
            num_unknown=0,
            history_hash=roll_history(
                mark.history_hash, [self._hashed(event) for event in events[mark.num_events - first :]]
            ),
            fingerprint=self.recommender.fingerprint,
            session_place=int(places[0]),
        )

    def with_own_items(self, state: UserState, before: UserState | None, added: Sequence[StoredEvent]) -> UserState:
        """Return `state` with the own items of `before` and `added`; adding does not mind the order."""
        items, times = self._rows(added)
        unknown = int((items == UNKNOWN_ITEM).sum())
        if before is None:
            return replace(state, seen=SeenItems.from_events(items, times), num_unknown=unknown)
        return replace(state, seen=before.seen.add(items, times), num_unknown=before.num_unknown + unknown)

    def reads_anew(self, state: UserState, vocabulary: Vocabulary, item_ids: Iterable[str]) -> bool:
        """Return whether the state has an item whose row is new here, or may be another."""
        known = vocabulary.num_items
        same = known <= self.vocabulary.num_items and self._appended(known) == vocabulary.appended
        first = known if same else self._num_base_items
        index_of = self.recommender.run.items.index_of
        met = bool((state.seen.item_index >= first).any())
        return met or (state.num_unknown > 0 and any(index_of.get(item, UNKNOWN_ITEM) >= first for item in item_ids))

    # -- bytes ------------------------------------------------------------------------------------------------

    def segment_names(self, state: UserState) -> list[bytes]:
        """Return the names of the segments a cold record holds."""
        return self._bytes.segment_names(state)

    def dump(self, state: UserState) -> StateParts:
        """Return a state as bytes without the events' rows of its summary layers."""
        return self._bytes.dump(state)

    def load(self, parts: StateParts) -> UserState:
        """Return the cold state of `dump`'s bytes."""
        return self._bytes.load(parts)

    def difference(self, state: UserState, other: UserState) -> float:
        """Return the largest difference of a row, relative to its norm; infinite where the histories differ."""
        told = ("history_hash", "num_events", "num_unknown", "last_key", "fingerprint", "session_place")
        if any(getattr(state, name) != getattr(other, name) for name in told):
            return float("inf")
        seen = ("item_index", "count", "first", "last")
        if not all(np.array_equal(getattr(state.seen, name), getattr(other.seen, name)) for name in seen):
            return float("inf")
        worst = 0.0
        for mine, theirs in zip(state.memory.layers, other.memory.layers):
            for rows, others in ((mine.events, theirs.events), (mine.summaries, theirs.summaries)):
                a, b = rows.whole().flatten(2).double(), others.whole().flatten(2).double()
                if a.numel():
                    change = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)
                    worst = max(worst, float(change.max()))
        return worst

    # -- answers ----------------------------------------------------------------------------------------------

    def recommend(self, questions: Sequence[Question]) -> list[Scored]:
        """Answer questions: one pass of the network for all, then one search each."""
        with self._one_pass, _told_users_refused():
            return rank_items(self.recommender, questions)

    def score(
        self,
        state: UserState,
        item_ids: Sequence[str],
        request_time: int | None,
        user: Mapping[str, object] | None = None,
    ) -> list[float | None]:
        """Return each item's score."""
        with self._one_pass, _told_users_refused():
            return self.recommender.score(state, item_ids, request_time, user)

    def own_item_bias(self, state: UserState, item_id: str, request_time: int | None) -> float | None:
        """Return what the item's score gains by the user having met it; None where that never was."""
        row = self.recommender.run.items.index_of.get(item_id, UNKNOWN_ITEM)
        met = state.seen.of(row)
        return float(self.recommender.own_gains(state, met, request_time)[0]) if len(met) else None

    def explain(
        self,
        state: UserState,
        newest: Sequence[StoredEvent],
        met: Sequence[Meeting],
        item_id: str,
        request_time: int | None,
        most: int,
        user: Mapping[str, object] | None = None,
    ) -> list[ChunkReason]:
        """Return the chunks that carried an item's score."""
        with _told_users_refused():
            last_input = self._last_input(newest) if newest else _no_input
            return explain(self.recommender, state, last_input, met, item_id, request_time, most, user)

    def title(self, item_id: str) -> str | None:
        """Return what people call an item."""
        items = self.recommender.run.items
        row = items.index_of.get(item_id)
        return None if items.title is None or row is None else items.title[row]

    def find_items(self, text: str, most: int) -> list[str]:
        """Return ids of items whose id or title has `text` in it, the most frequent in training first."""
        items = self.recommender.run.items
        wanted = text.casefold()
        found = []
        for row in np.argsort(-items.count, kind="stable"):
            item_id = items.item_id[row]
            if item_id is None:
                continue
            title = items.title[row] if items.title else None
            if wanted in item_id.casefold() or (title and wanted in title.casefold()):
                found.append(item_id)
                if len(found) == most:
                    break
        return found

    # -- helpers ----------------------------------------------------------------------------------------------

    def _appended(self, num_items: int) -> str:
        """Return the hash of the items beyond those that the fingerprint covers, up to so many rows."""
        if num_items <= self._num_base_items:
            return ""
        return appended_hash(self.recommender.network, self._num_base_items, num_items)

    def _after(
        self,
        state: UserState,
        memory: UserMemory,
        events: Sequence[StoredEvent],
        items: NDArray[np.int64],
        times: NDArray[np.int64],
        place: int,
    ) -> UserState:
        last_key = self._key(events[-1], memory.num_events - 1)
        if state.last_key is not None and self._key(events[0], state.num_events) < state.last_key:
            raise OutOfOrderError("append: expected events after the state's last, got an earlier one.")
        return UserState(
            memory=memory,
            last_key=last_key,
            seen=state.seen.add(items, times),
            num_unknown=state.num_unknown + int((items == UNKNOWN_ITEM).sum()),
            history_hash=roll_history(state.history_hash, [self._hashed(event) for event in events]),
            fingerprint=state.fingerprint,
            session_place=place,
        )

    def _hashed(self, event: StoredEvent) -> Event:
        return Event(
            event.item_id,
            event.timestamp,
            event.event_type,
            event.event_id if self._by_id else None,
            event.value if self._by_value else None,
        )

    def _key(self, event: StoredEvent, place: int) -> tuple[int, bytes]:
        kind = self.recommender.run.info.tie
        event_id, event_type = event.event_id, event.event_type
        return order_key(kind, event.timestamp, event.item_id, event_id=event_id, event_type=event_type, arrival=place)

    def _rows(self, events: Sequence[StoredEvent]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.recommender.rows(events)

    def _last_input(self, newest: Sequence[StoredEvent]) -> Tensor:
        """Return the input to the first block of the last of these events, at least one, [1, E]."""
        *before, last = newest
        time = before[-1].timestamp if before else None
        arrivals, _ = self.recommender.arrivals([last], *self._rows([last]), [1], [time], [self._session_place(before)])
        network = self.recommender.network
        with torch.inference_mode(), network.arithmetic():
            return network.embed(
                arrivals.item_index, arrivals.event_type, arrivals.gap_bucket, arrivals.counts, arrivals.features
            )

    def _session_place(self, events: Sequence[StoredEvent]) -> int:
        """Return the place of the last of these events, which reach back far enough or to the history's start."""
        if not events:
            return NO_PLACE
        times = np.array([event.timestamp for event in events], dtype=np.int64)
        offsets = np.array([0, len(times)])
        return int(self.recommender.event_features.arrivals(times, None, offsets, [None], [NO_PLACE])[1][0])

    def _cut(self, layer: LayerState, num_events: int) -> LayerState:
        if layer.kind == "full":
            return LayerState("full", first_rows(layer.events, num_events), layer.summaries)
        nothing = SharedRows((), layer.summaries.tail[:0])
        return LayerState("summary", nothing, first_rows(layer.summaries, num_summary_rows(self._config, num_events)))


_no_input = torch.zeros(0)


@contextmanager
def _full_pool_refused() -> Iterator[None]:
    try:
        yield
    except PoolFullError as error:  # states in use fill it; those that are not leave memory before it is full
        raise OverloadedError(str(error)) from error


@contextmanager
def _told_users_refused() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise InvalidRequestError(str(error), "invalid-user") from error


def first_rows(rows: SharedRows, count: int) -> SharedRows:
    """Return the first `count` rows; whole segments are shared."""
    segments: list[Tensor] = []
    for segment in (*rows.segments, rows.tail):
        if count < len(segment):
            return SharedRows(tuple(segments), segment[:count].clone())
        segments.append(segment)
        count -= len(segment)
    return rows
