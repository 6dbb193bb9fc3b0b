"""Scores of a trained run: the network's user vectors times all item vectors, plus the own-item bias.

Each user is read once for all of the user's questions and all kinds of request time, which keys and values never
depend on. Q questions, I items, E width of vectors, P (question, item) pairs.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_ksa.data.assemble import question_features, questions_batch, span_start
from recsys_ksa.data.batches import Batch, QuestionRows
from recsys_ksa.data.jagged_arrays import ragged_arange
from recsys_ksa.data.popularity import DayCounts
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import Questions, RequestTime, held_out_start, request_times
from recsys_ksa.evaluate.stored_summaries import Memory, stored_summaries
from recsys_ksa.features import NO_GAP, EventFeatures, WeightedRows, gap_buckets
from recsys_ksa.model.network import Network
from recsys_ksa.model.place import chunk_layout, place_histories
from recsys_ksa.model.popularity import Popularity, add_popularity
from recsys_ksa.progress import progress

if TYPE_CHECKING:
    from ksa_kernels import ChunkLayout
    from recsys_ksa.config import ModelConfig
    from recsys_ksa.data.dataset import Dataset
    from recsys_ksa.model.network import Rows
    from recsys_ksa.model.scoring import ScoringNetwork

AttentionImpl = Literal["auto", "reference", "torch", "triton"]
BATCH_EVENTS = 1 << 15
"""Event tokens of a pass, one user at least."""


@dataclass(frozen=True)
class RunScorer:
    """Scores of one network for a fixed table of questions, shown one kind of request time."""

    name: str
    request_time: RequestTime
    network: "ScoringNetwork"
    vectors: Tensor
    """[Q, E] of the whole table, float32."""
    items: Tensor
    """[I + 1, E], float32."""
    now: NDArray[np.int64]
    """[Q] of the whole table: the time of asking, or where none is shown, of the last event."""
    ownership: Ownership
    max_length: int | None
    """Events read of each question; None: all."""
    popularity: Popularity | None = None
    """What the protocol lets be counted, where the network has a popularity bias."""

    def scores(self, questions: Questions) -> Tensor:
        """Return float32 [Q, I + 1] on the network's device."""
        device = self.items.device
        scores = self.vectors[torch.from_numpy(questions.number).to(device)] @ self.items.T
        if self.network.own_items is None:
            self._add_popularity(scores, questions, None)
            return scores
        length, chunk_size = self.max_length, self.network.config.chunk_size
        start = None if length is None else span_start(questions.cut, length, chunk_size)
        owned = self.ownership.before(questions, start)
        now = self.now[questions.number][owned.question]
        parts = (owned.question, owned.item, owned.count, owned.first, owned.last, now)
        question, item, *rest = (torch.from_numpy(part).to(device) for part in parts)
        with torch.no_grad():
            scores[question, item] += self.network.own_bias(item, *rest).to(torch.float32)
        self._add_popularity(scores, questions, (question, item))
        return scores

    def _add_popularity(self, scores: Tensor, questions: Questions, own: tuple[Tensor, Tensor] | None) -> None:
        """Add popularity as of each question's own time, whatever request time it is shown: as the baselines do."""
        if self.network.popularity_bias is not None and self.popularity is not None:
            time = torch.from_numpy(questions.timestamp).to(scores.device)
            with torch.no_grad():
                add_popularity(scores, self.network.popularity_bias, self.popularity, time, own)


def run_scorers(
    name: str,
    network: "ScoringNetwork",
    dataset: "Dataset",
    questions: Questions,
    ownership: Ownership,
    variants: Sequence[RequestTime],
    *,
    max_length: int | None = None,
    memory: Memory = "own",
    attention_impl: AttentionImpl = "auto",
) -> list[RunScorer]:
    """Return one scorer for each kind of request time.

    Args:
        name: what to call them.
        network: of the run, on its device.
        dataset: what the questions are about.
        questions: all that will be asked.
        ownership: of the data set's histories.
        variants: kinds of request time.
        max_length: show the network the newest events of each question only, at most so many, cut at a chunk boundary
            with true positions; owned items are counted in those events too. At least the chunk size. None: all.
        memory: whose summaries the network reads (`stored_summaries`); other than `own` with whole histories only.
        attention_impl: implementation of summary attention.
    """
    assert memory == "own" or max_length is None
    histories = dataset.histories
    user_ids = histories.user_ids()
    times = {variant: request_times(questions, variant, user_ids) for variant in variants}
    buckets = np.stack(
        [
            np.where(shown, gap_buckets(now - questions.last_timestamp), NO_GAP)
            for now, shown in (times[variant] for variant in variants)
        ]
    )
    telling = question_features(histories, network.config)
    known_users = histories.users if telling.users else None
    vectors: list[list[Tensor]] = [[] for _ in variants]
    limit = min((length for length in (max_length, network.max_length) if length is not None), default=None)
    read = _shared(questions, limit, network.config.chunk_size)
    batches = list(_batches(questions, read, limit))
    for rows in progress(batches, f"reading histories: {name}", unit="batch"):
        batch = _batch(dataset, questions, read, rows, network.config, limit)
        batch = batch.to(network.start.device)
        users = np.unique(questions.user[rows])
        fixed = stored_summaries(network, histories, users, batch, memory, attention_impl)
        told = [
            telling.rows(known_users, questions.user[rows], now[rows], shown[rows])
            for now, shown in (times[variant] for variant in variants)
        ]
        for kept, answer in zip(vectors, user_vectors(network, batch, buckets[:, rows], attention_impl, fixed, told)):
            kept.append(answer)
    items = network.item_vectors().detach().to(torch.float32)
    popularity = None
    if network.popularity_bias is not None:
        end = None if questions.protocol == "global" else held_out_start(histories, questions.protocol)
        popularity = Popularity(DayCounts.of_histories(histories, end), dataset.num_items).to(items.device)
    return [
        RunScorer(
            name, variant, network, torch.cat(answers), items, times[variant][0], ownership, max_length, popularity
        )
        for variant, answers in zip(variants, vectors)
    ]


@torch.no_grad()
def user_vectors(
    network: "ScoringNetwork",
    batch: Batch,
    buckets: NDArray[np.int64],
    attention_impl: AttentionImpl = "auto",
    fixed: "Sequence[Rows | None] | None" = None,
    told: Sequence[WeightedRows | None] | None = None,
) -> list[Tensor]:
    """Return the user vectors of a batch's questions for each row of request buckets, float32 [Q, E] each.

    Equal to calling the network once a row; the histories are read once.

    Args:
        network: in eval mode.
        batch: histories and questions; its own request buckets are not used.
        buckets: [V, Q].
        attention_impl: implementation of summary attention.
        fixed: each layer's rows to read in place of those computed, as in `Network.encode`.
        told: what the questions tell beside the history, V times; None: what the batch's do.
    """
    device = network.start.device
    given = [batch.told] * len(buckets) if told is None else [_on(device, rows) for rows in told]
    if not isinstance(network, Network):
        return _by_passes(network, batch, buckets, given)
    known = batch.question_row >= 0
    extras = [network.told(rows) for rows in given]
    if not bool(known.any()):
        starts = [network.starts(batch.num_questions, extra) for extra in extras]
        return [network.user_vectors(start).to(torch.float32) for start in starts]
    place = place_histories(network.config, batch.offsets, batch.first_position, device, network.dtype)
    lengths = batch.offsets.diff()
    events = network.embed(batch.item_index, batch.event_type, batch.gap_bucket, lengths, batch.features)
    encoded = network.encode(events, place, attention_impl, fixed=fixed)
    asking, layout = _asking_events(network, batch, place.layouts[network.last_kind])
    cos, sin = place.event_rotary
    rotary = cos[asking], sin[asking]
    last_input = encoded.last_input[asking]
    row = torch.searchsorted(asking, batch.question_row.clamp(min=0)).clamp(max=len(asking) - 1)
    vectors = []
    for asked, extra in zip(torch.from_numpy(buckets).to(device), extras):
        bucket = torch.zeros(len(asking), dtype=torch.int64, device=device)
        bucket[row[known]] = asked[known]
        spread = None if extra is None else torch.zeros_like(last_input).index_put((row[known],), extra[known])
        hidden = network.answer(last_input, bucket, encoded.rows[-1], layout, rotary, row, attention_impl, spread)
        hidden = torch.where(known[:, None], hidden, network.starts(len(row), extra))
        vectors.append(network.user_vectors(hidden).to(torch.float32))
    return vectors


def _on(device: torch.device, rows: WeightedRows | None) -> QuestionRows | None:
    found = QuestionRows.of(rows)
    return None if found is None else found.to(device)


def _by_passes(
    network: "ScoringNetwork", batch: Batch, buckets: NDArray[np.int64], told: Sequence[QuestionRows | None]
) -> list[Tensor]:
    """Return `user_vectors` of another architecture: a pass a row of buckets, one for all where none is looked at."""
    found: list[Tensor] = []
    for asked, rows in zip(torch.from_numpy(buckets).to(batch.request_bucket.device), told):
        if not found or network.request is not None or network.question is not None:
            found.append(network(dataclasses.replace(batch, request_bucket=asked, told=rows)).to(torch.float32))
    return found if len(found) == len(buckets) else found * len(buckets)


def _asking_events(network: Network, batch: Batch, layout: "ChunkLayout") -> tuple[Tensor, "ChunkLayout"]:
    """Return the rows of the batch from each user's first question on, and the last layer's layout of them."""
    config = network.config
    if network.last_kind == "summary" and config.max_visible_chunks is not None:
        # A layout that starts late expects only the summaries still visible there; here all of them are given.
        return torch.arange(batch.num_events, device=batch.offsets.device), layout
    offsets = batch.offsets.cpu().numpy()
    first = offsets[1:].copy()
    row, user = batch.question_row.cpu().numpy(), batch.question_user.cpu().numpy()
    np.minimum.at(first, user[row >= 0], row[row >= 0])
    late = chunk_layout(config, network.last_kind, batch.offsets, (first - offsets[:-1]).tolist())
    asking = torch.from_numpy(ragged_arange(first, offsets[1:] - first))
    return asking.to(batch.offsets.device), late.to(layout.device)


def window_events(config: "ModelConfig") -> int:
    """Return how many events a question still sees as events at most, (W + 1) * k: all that short memory holds."""
    return (config.window_chunks + 1) * config.chunk_size


def _shared(questions: Questions, max_length: int | None, chunk_size: int) -> NDArray[np.int64]:
    """Return which history each question reads, int64 [Q], ascending: those of one user and first event share one."""
    start = span_start(questions.cut, max_length, chunk_size)
    fresh = (np.diff(questions.user) != 0) | (np.diff(start) != 0)
    return np.concatenate(([0], np.cumsum(fresh)))[: len(questions)]


def _batch(
    dataset: "Dataset",
    questions: Questions,
    read: NDArray[np.int64],
    rows: slice,
    config: "ModelConfig",
    max_length: int | None,
) -> Batch:
    _, first, question_user = np.unique(read[rows], return_index=True, return_inverse=True)
    users, cuts = questions.user[rows][first], questions.cut[rows]
    return questions_batch(
        dataset.histories,
        users,
        question_user,
        cuts,
        chunk_size=config.chunk_size,
        max_length=max_length,
        features=EventFeatures.of(config),
    )


def _batches(questions: Questions, read: NDArray[np.int64], max_length: int | None) -> Iterator[slice]:
    """Cut the questions into runs of whole histories within `BATCH_EVENTS`, one history at least."""
    ends = np.append(np.flatnonzero(np.diff(read)) + 1, len(questions))
    cost = questions.cut[ends - 1]
    if max_length is not None:
        cost = np.minimum(cost, max_length)
    start, spent = 0, 0
    for at in range(len(ends)):
        if spent and spent + cost[at] > BATCH_EVENTS:
            yield slice(start, int(ends[at - 1]))
            start, spent = int(ends[at - 1]), 0
        spent += int(cost[at])
    yield slice(start, len(questions))
