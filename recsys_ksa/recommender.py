"""The library's front door: load a run, keep a user's state, append events, ask what comes next.

    rec = Recommender.load("runs/ksa")
    state = rec.append(rec.new_state(), ["milk", "bread"], [1700000000, 1700000000])
    rec.recommend(state, k=10, request_time=1700600000)

Imports without polars, mlflow and faiss.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_ksa.data.batches import QuestionRows
from recsys_ksa.errors import DataError, OutOfOrderError, StateError
from recsys_ksa.events import Event, EventLike, ItemId, checked_events, roll_history
from recsys_ksa.features import NO_GAP, EventFeatures, QuestionFeatures, Told, gap_buckets, request_bucket, told_users
from recsys_ksa.model.append import Arrivals, append_events, ask, empty_memory
from recsys_ksa.model.fingerprint import state_fingerprint
from recsys_ksa.model.network import Network
from recsys_ksa.model.own_items import ArrayOwnItemBias
from recsys_ksa.model.pages import PagePool
from recsys_ksa.model.seen import SeenItems
from recsys_ksa.model.state import UserState
from recsys_ksa.order import OrderKey, order_key
from recsys_ksa.retrieval.index import FaissIndex, Found, Index, IndexKind, TorchIndex, read_vectors, row_products
from recsys_ksa.retrieval.ivf import load_ivf
from recsys_ksa.retrieval.popularity_column import PopularityColumn, popularity_column
from recsys_ksa.run import INDEX_FOLDER, Run, load_counts, load_network, open_run
from recsys_ksa.schema import UNKNOWN_ITEM

log = logging.getLogger(__name__)

Answer = list[tuple[str, float]]
ROWS_ON_DEVICE = 1 << 20
"""Own items of all users scored at once on an accelerator."""


class Recommender:
    """A loaded run. It holds no user: states are values, given and returned. Safe to share between threads."""

    def __init__(
        self,
        run: Run,
        network: Network,
        index: Index,
        attention_impl: str = "auto",
        popularity: PopularityColumn | None = None,
        pool: PagePool | None = None,
    ) -> None:
        """Join the parts; use `Recommender.load`."""
        self.pool = pool
        """What holds the states' rows; None where each has tensors of its own."""
        self.run = run
        self.network = network
        self.index = index
        self.attention_impl = attention_impl
        self.fingerprint = state_fingerprint(network, run.info.num_base_items)
        self.event_features = EventFeatures.of(network.config)
        self.question_features = QuestionFeatures.of(network.config, network.features.users)
        vectors = network.item_vectors().detach().to("cpu", torch.float32)
        self._vectors = (vectors if popularity is None else popularity.added_to(vectors)).numpy()
        own_items, item_bias = network.own_items, network.item_bias if popularity is None else popularity.gain
        self._own_bias = None if own_items is None else ArrayOwnItemBias.of(own_items)
        self._item_bias = None if item_bias is None else item_bias.detach().to("cpu", torch.float32).numpy()
        named = enumerate(run.items.item_id)
        self._blanked = np.array([row for row, name in named if row != UNKNOWN_ITEM and name is None], dtype=np.int64)
        """Items whose id `ksa forget` has blanked: they are never answered."""
        self.unnamed = np.append(self._blanked, UNKNOWN_ITEM)
        """Rows that are never answered: the blanked items' and the unknown item's."""
        self.popularity = popularity
        """What items gain by their popularity as of a fixed time; None for a run without a popularity bias."""

    @staticmethod
    def load(
        run_or_bundle: str | Path,
        device: str = "cpu",
        precision: Literal["float32", "float64", "bf16"] = "float32",
        pool_bytes: int | None = None,
        index: IndexKind = "exact",
    ) -> "Recommender":
        """Load a run or bundle.

        Args:
            run_or_bundle: its directory. Without `index/` items are searched exactly in memory, and the log says so;
                items are then as popular as at the last event of the data set the run was trained on.
            device: where the network runs.
            precision: of the network; `bf16` keeps parameters in float32 and states in bf16.
            pool_bytes: keep the states' rows in pages of one pool of so many bytes on the device, for many users a call
                on an accelerator; None: each state has tensors of its own.
            index: how items are searched; `ivf` takes the lists that `ksa index --kind ivf` has written.

        Raises:
            ConfigError: the network's states cannot be kept in pages.
            MissingPackageError: the index is searched by faiss, which is not installed.
            RunError: something is missing or damaged, index and run disagree, or the index misses too many items.
        """
        run = open_run(run_or_bundle)
        weights = load_network(run, "cpu")
        # By the CPU, as `ksa index` has them: a GPU's differ in their last bits, and the index is known by its bits.
        vectors = weights.item_vectors().detach().to(torch.float32)
        folder = run.path / INDEX_FOLDER
        popularity = None
        if weights.popularity_bias is not None:
            popularity = (
                PopularityColumn.load(folder) if folder.exists() else popularity_column(weights, load_counts(run))
            )
        found = _open_index(index, folder, weights, vectors, run.info.release_hash, popularity)
        log.info("searching %d items: %s", run.info.num_items - 1, found.kind)
        if popularity is not None:
            log.info("items are as popular as on the days before %d s", popularity.as_of)
        network = weights.to(device, torch.float64 if precision == "float64" else None)
        if precision == "bf16":
            network.precision = "bf16"
        pool = None
        if pool_bytes is not None:
            where = network.start.device
            pool = PagePool(network.config, pool_bytes, network.state_dtype, network.dtype, where)
            if where.type == "cuda":
                from recsys_ksa.model.recorded import Recorder  # imports Triton

                pool.recorder = Recorder.of(network, pool)
        return Recommender(run, network, found, popularity=popularity, pool=pool)

    # --- states ---

    def new_state(self) -> UserState:
        """Return the state of a user without events."""
        memory = empty_memory(self.network) if self.pool is None else self.pool.empty
        return UserState(memory, None, SeenItems.empty(), 0, bytes(32), self.fingerprint)

    def append(
        self,
        state: UserState,
        item_ids: Sequence[ItemId],
        timestamps: Sequence[int],
        event_types: Sequence[str | None] | None = None,
        features: Mapping[str, Sequence[object]] | None = None,
        event_ids: Sequence[str | None] | None = None,
    ) -> UserState:
        """Return the state after further events, sorted by the run's order; `state` stays valid.

        Args:
            item_ids: raw ids, n of them. An id the run does not know is counted and read as the unknown item.
            timestamps: Unix seconds (whatever the run's clock is), n of them.
            event_types, event_ids: n of them where the log has them. An unknown type is read as the unknown category.
            features: `value`, n numbers or None, where the run reads values (`model.value_edges`); nothing else.

        Raises:
            DataError: lengths differ, or a value is of the wrong kind.
            OutOfOrderError: the first event, after sorting, lies before the state's last.
            StateError: the state belongs to another network.
            PoolFullError: the states held leave no room in the pool.
        """
        self._own(state)
        reads_value = bool(self.event_features.value_edges)
        events = checked_events(item_ids, timestamps, event_types, event_ids, features, reads_value=reads_value)
        if not events:
            return state
        kind = self.run.info.tie
        keyed: list[tuple[OrderKey, Event]] = sorted(
            (
                (
                    order_key(
                        kind,
                        event.timestamp,
                        event.item_id,
                        event_id=event.event_id,
                        event_type=event.event_type,
                        arrival=state.num_events + place,
                    ),
                    event,
                )
                for place, event in enumerate(events)
            ),
            key=lambda pair: pair[0],
        )
        first = keyed[0][0]
        if state.last_key is not None and first < state.last_key:
            raise OutOfOrderError(
                f"append: expected events from {state.last_key[0]} s on (after the state's last event), got one at "
                f"{first[0]} s that sorts before it. Rebuild the state from all events, in order."
            )
        events = [event for _, event in keyed]
        items, times = self.rows(events)
        before = ([len(events)], [state.last_timestamp], [state.session_place])
        arrivals, session_places = self.arrivals(events, items, times, *before)
        memory = append_events(self.network, [state.memory], arrivals, self.attention_impl, self.pool)[0]
        return UserState(
            memory=memory,
            last_key=keyed[-1][0],
            seen=state.seen.add(items, times),
            num_unknown=state.num_unknown + int((items == UNKNOWN_ITEM).sum()),
            history_hash=roll_history(state.history_hash, events),
            fingerprint=self.fingerprint,
            session_place=int(session_places[0]),
        )

    # --- answers ---

    def user_vector(self, state: UserState, request_time: int | None = None, user: Told | None = None) -> Tensor:
        """Return the user's vector, [E] ([E + 1] with an item bias): item score = vector . item vector.

        A user without events gets the learned start vector. A request time before the last event counts as a gap of 0;
        None means no request time. `user` is as for `recommend`.
        """
        return self.user_vectors([state], [request_time], [user])[0]

    def user_vectors(
        self, states: Sequence[UserState], request_times: Sequence[int | None], users: Sequence[Told | None]
    ) -> Tensor:
        """Return `user_vector` of several states, [U, E (+ 1)], in one pass."""
        for state in states:
            self._own(state)
        last = [state.last_timestamp for state in states]
        buckets = [request_bucket(*times) for times in zip(last, request_times)]
        told = self.told(last, request_times, users)
        return ask(self.network, [state.memory for state in states], buckets, self.attention_impl, told, self.pool)

    def told(
        self, last: Sequence[int | None], request_times: Sequence[int | None], users: Sequence[Told | None]
    ) -> QuestionRows | None:
        """Return what questions tell beside the history; None where the run reads nothing of it.

        Args:
            last: time of each user's last event; None without events, when no request time is shown either.
            request_times: Unix seconds; None: none is shown.
            users: each user's features.

        Raises:
            DataError: a feature that the run does not read, or a value that is not of its kind.
        """
        columns = told_users(users, self.network.features.users, self.run.user_categories)
        if not self.question_features.num_rows:
            return None
        shown = np.array([a is not None and b is not None for a, b in zip(last, request_times)])
        times = np.array([max(a or 0, b or 0) for a, b in zip(last, request_times)], dtype=np.int64)
        rows = self.question_features.rows(columns, np.arange(len(users)), times, shown)
        found = QuestionRows.of(rows)
        return None if found is None else found.to(self.network.start.device)

    def recommend(
        self,
        state: UserState,
        k: int = 10,
        request_time: int | None = None,
        exclude_seen: bool | None = None,
        only_seen: bool = False,
        user: Told | None = None,
    ) -> Answer:
        """Return up to k (item_id, score), best first, equal scores by item index.

        Args:
            k: how many; at least 1.
            request_time: Unix seconds; None means none.
            exclude_seen: leave out items the user already had ("new for you"); None takes the run's default.
            only_seen: answer from the user's own items alone ("again").
            user: the user's features that the run reads (`model.user_features`), as the table of users has them; what
                is missing is unknown.

        Raises:
            DataError: k is below 1, both filters are asked for, or a feature is none of the run's.
        """
        if k < 1:
            raise DataError(f"recommend: k must be at least 1, got {k}.")
        if only_seen and exclude_seen:
            raise DataError("recommend: expected one of only_seen and exclude_seen, got both. Ask twice.")
        return self.rank(state, self.user_vector(state, request_time, user), k, request_time, exclude_seen, only_seen)

    def rank(
        self,
        state: UserState,
        user_vector: Tensor,
        k: int = 10,
        request_time: int | None = None,
        exclude_seen: bool | None = None,
        only_seen: bool = False,
        found: Found | None = None,
    ) -> Answer:
        """Return `recommend`'s answer where the user's vector is known already, as from a batch of `ask`.

        Args:
            found: the index's answer to this vector, k and the user's own items, where a batch was searched at once.
        """
        exclude = self.run.info.exclude_seen and not only_seen if exclude_seen is None else exclude_seen
        vector = user_vector.to("cpu", torch.float32).numpy()
        owned = state.seen.item_index.astype(np.int64)
        rows, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
        if not only_seen:
            hidden = np.union1d(owned, self._blanked) if len(self._blanked) else owned
            rows, scores = found if found is not None else self.index.search(vector, k, hidden)
        if not exclude and len(owned):
            # Owned items carry a bias of their own, so they are scored directly; the merge stays exact.
            rows = np.concatenate((rows, owned))
            scores = np.concatenate((scores, self._owned_scores(state, state.seen, vector, request_time)))
        if len(self._blanked):
            named = ~np.isin(rows, self._blanked)
            rows, scores = rows[named], scores[named]
        if len(scores) > k:  # a long history owns tens of thousands; ties with the last stay
            kept = scores >= np.partition(scores, -k)[-k]
            rows, scores = rows[kept], scores[kept]
        best = np.lexsort((rows, -scores))[:k]
        return [(str(self.run.items.item_id[rows[at]]), float(scores[at])) for at in best]

    def score(
        self,
        state: UserState,
        item_ids: Sequence[ItemId],
        request_time: int | None = None,
        user: Told | None = None,
    ) -> list[float | None]:
        """Return the score `recommend` gives each item, owned or not; None for items the run does not know."""
        vector = self.user_vector(state, request_time, user).to("cpu", torch.float32).numpy()
        rows = np.array([self.run.items.index_of.get(str(item), UNKNOWN_ITEM) for item in item_ids], dtype=np.int64)
        scores = self._vectors[rows] @ vector
        owned, met = state.seen.of_items(rows)
        scores[owned] = self._owned_scores(state, met, vector, request_time)
        return [None if row == UNKNOWN_ITEM else float(score) for row, score in zip(rows, scores)]

    @property
    def item_vectors(self) -> NDArray[np.float32]:
        """The vectors that scores are inner products with, float32 [I, E (+ 1)], row = item_index."""
        return self._vectors

    def _owned_scores(
        self, state: UserState, met: SeenItems, vector: NDArray[np.float32], request_time: int | None
    ) -> NDArray[np.float32]:
        """Return the scores of items that the user has met so, float32 [O]."""
        return row_products(self._vectors, met.item_index, vector) + self.own_gains(state, met, request_time)

    def own_gains(self, state: UserState, met: SeenItems, request_time: int | None) -> NDArray[np.float32]:
        """Return what items' scores gain where the user of `state` has met them so, float32 [O].

        Args:
            met: items with their meetings, as `state.seen` has them or as they might be; an item may be there twice.
            request_time: Unix seconds; None means none.
        """
        if self._own_bias is None:
            return np.zeros(len(met), np.float32)
        last = state.last_timestamp or 0
        gains = self._own_bias(met, last if request_time is None else max(last, request_time)).astype(np.float32)
        # The own-item bias takes the item bias's place.
        return gains if self._item_bias is None else gains - self._item_bias[met.item_index]

    def owned_scores(
        self,
        states: Sequence[UserState],
        users: Tensor,
        items: Tensor,
        vectors: Tensor,
        request_times: Sequence[int | None],
        item_vectors: Tensor,
    ) -> Tensor:
        """Return the score of each pair of `owned_items`, float32 [n], where `item_vectors` are.

        Args:
            states, request_times: of the users.
            users, items: the pairs.
            vectors: user vectors, float32 [U, E (+ 1)].
            item_vectors: `item_vectors` on the device, float32 [I, E (+ 1)].
        """
        device = item_vectors.device
        scores = torch.cat(
            [
                torch.linalg.vecdot(item_vectors[some], vectors[whose])
                for some, whose in zip(items.split(ROWS_ON_DEVICE), users.split(ROWS_ON_DEVICE))
            ]
        )
        if self.network.own_items is None:
            return scores
        if self._item_bias is not None:  # the own-item bias takes its place
            scores = scores - torch.from_numpy(self._item_bias).to(device)[items]
        columns = ([getattr(state.seen, name) for state in states] for name in ("count", "first", "last"))
        count, first, last = (torch.from_numpy(np.concatenate(column)).to(device) for column in columns)
        latest = [state.last_timestamp or 0 for state in states]
        now = torch.tensor([max(a, b or 0) for a, b in zip(latest, request_times)], device=device)
        with torch.inference_mode():
            bias = torch.cat(
                [
                    self.network.own_items(*each)
                    for each in zip(*(column.split(ROWS_ON_DEVICE) for column in (count, first, last, now[users])))
                ]
            )
        return scores + bias.to(scores.dtype)

    def rows(self, events: Sequence[EventLike]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each event's item row and time, int64 [n] each; an id the run does not know is the unknown item."""
        index_of = self.run.items.index_of
        items = np.array([index_of.get(event.item_id, UNKNOWN_ITEM) for event in events], dtype=np.int64)
        return items, np.array([event.timestamp for event in events], dtype=np.int64)

    def arrivals(
        self,
        events: Sequence[EventLike],
        items: NDArray[np.int64],
        times: NDArray[np.int64],
        counts: Sequence[int],
        last_timestamps: Sequence[int | None],
        session_places: Sequence[int],
    ) -> tuple[Arrivals, NDArray[np.int64]]:
        """Return users' next events as the network reads them, and the places in their sessions after them, int64 [U].

        Args:
            events: user by user, in order.
            items, times: as `rows` gives them.
            counts: events of each user, at least one.
            last_timestamps: of the event before each user's first; None at a history's start.
            session_places: of that event.
        """
        offsets = np.array([0, *accumulate(counts)], dtype=np.int64)
        starts = offsets[:-1]
        before = np.roll(times, 1)
        before[starts] = [time or 0 for time in last_timestamps]
        gaps = gap_buckets(times - before)
        gaps[starts[[time is None for time in last_timestamps]]] = NO_GAP
        device = self.network.start.device
        event_type = None
        if self.network.features.num_event_types:
            known = self.run.event_types
            event_type = torch.tensor([known.get(event.event_type or "", 0) for event in events], device=device)
        values = [event.value for event in events] if self.event_features.value_edges else None
        columns, places = self.event_features.arrivals(times, values, offsets, last_timestamps, session_places)
        arrivals = Arrivals(
            list(counts),
            torch.from_numpy(items).to(device),
            event_type,
            torch.from_numpy(gaps).to(device),
            {name: torch.from_numpy(column).to(device) for name, column in columns.items()},
        )
        return arrivals, places

    def _own(self, state: UserState) -> None:
        if state.fingerprint != self.fingerprint:
            raise StateError(
                f"state: expected one of this network ({self.fingerprint[:12]}), got {state.fingerprint[:12]}. "
                "Rebuild it from the user's events."
            )


def owned_items(states: Sequence[UserState], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return users' own items on a device as pairs: place in `states`, item index; int64 [n] each, user by user."""
    counts = torch.tensor([len(state.seen) for state in states], device=device)
    items = torch.from_numpy(np.concatenate([state.seen.item_index for state in states])).to(device)
    return torch.arange(len(states), device=device).repeat_interleave(counts, output_size=len(items)), items.long()


def _open_index(
    kind: IndexKind, folder: Path, network: Network, vectors: Tensor, release: str, column: PopularityColumn | None
) -> Index:
    """Return what searches `vectors` [I, E (+ 1)], from the run's index folder where it has one."""
    if not folder.exists() and kind == "exact":
        return TorchIndex(vectors if column is None else column.added_to(vectors))
    if kind == "ivf":
        return load_ivf(folder, network, vectors, release, column)
    stored = read_vectors(folder, vectors, release, column)
    return FaissIndex(stored.vectors, stored.version)
