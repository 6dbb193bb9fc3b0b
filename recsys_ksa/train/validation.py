"""Validation while training: NDCG@10 of each user's first validation timestamp, by full ranking.

Each user is asked once: from the events of the training span (the newest `data.max_length` of them, as in training),
about all events of the first timestamp after it (`data.spans`). Test events are never read; an item's popularity counts
what came before the targets. Scores are float32, the
own-item bias is in them, ties count against us, and under `evaluate.exclude_seen` items the user already had are
left out unless they are targets. For choosing weights; `ksa evaluate` makes the figures to report.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recsys_ksa.config import RunConfig
from recsys_ksa.data.assemble import question_features, questions_batch
from recsys_ksa.data.batches import Batch
from recsys_ksa.data.epoch_plan import pack
from recsys_ksa.data.jagged_arrays import Ints, ragged_arange
from recsys_ksa.data.popularity import DayCounts
from recsys_ksa.data.spans import validation_span
from recsys_ksa.features import EventFeatures
from recsys_ksa.model.losses import own_bias, pair_items, pair_questions
from recsys_ksa.model.popularity import Popularity, add_popularity
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset
    from recsys_ksa.model.scoring import ScoringNetwork

K = 10
_VALIDATION_STREAM = 2
_SCORE_ROWS = 256
"""Questions scored at once against all items."""


@dataclass(frozen=True)
class Asked:
    """One batch of validation questions, a user each, and their targets."""

    batch: Batch
    target_question: Tensor
    """int64 [M], non-decreasing."""
    target_item: Tensor
    """int64 [M], each once a question."""
    target_time: Tensor
    """int64 [Q], Unix seconds of the targets."""


class Validation:
    """A fixed draw of users and their questions, built once."""

    def __init__(self, dataset: "Dataset", config: RunConfig) -> None:
        """Draw at most `train.validation_users` users that have validation events."""
        self._exclude_seen = config.evaluate.exclude_seen
        random = np.random.default_rng((config.seed, _VALIDATION_STREAM))
        start, end = validation_span(dataset, config.data.split)
        users = np.flatnonzero(end > start)
        users = np.sort(random.permutation(users)[: config.train.validation_users])
        size = _first_timestamp(dataset, users, start[users], end[users])
        length = np.minimum(start[users], config.data.max_length)
        self.num_users = len(users)
        counts = DayCounts.of_histories(dataset.histories, end) if config.model.item_bias == "popularity-7d" else None
        self._popularity = None if counts is None else Popularity(counts, dataset.num_items)
        self._asked = []
        for rows in pack(np.arange(len(users)), length, 4 * config.train.batch_tokens):
            self._asked.append(_ask(dataset, config, users[rows], start[users[rows]], size[rows], random))

    @torch.no_grad()
    def ndcg(self, network: "ScoringNetwork", device: torch.device, attention_impl: str, bf16: bool) -> float:
        """Return the mean over users of NDCG@10, 0 where no user validates."""
        network.eval()
        items = network.item_vectors().float()
        popularity = None if self._popularity is None else self._popularity.to(device)
        total = 0.0
        for asked in self._asked:
            batch = asked.batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                users = network(batch, attention_impl)
            question, item = asked.target_question.to(device), asked.target_item.to(device)
            seen = self._seen(network, batch)
            times = asked.target_time.to(device)
            for first in range(0, len(users), _SCORE_ROWS):
                rows = slice(first, min(first + _SCORE_ROWS, len(users)))
                scores = users[rows].float() @ items.T
                if network.popularity_bias is not None and popularity is not None:
                    own = None if network.own_items is None or seen is None else _within(seen, rows)[:2]
                    add_popularity(scores, network.popularity_bias, popularity, times[rows], own)
                scores[:, UNKNOWN_ITEM] = -torch.inf
                inside = (question >= rows.start) & (question < rows.stop)
                row, wanted = question[inside] - rows.start, item[inside]
                if seen is not None:
                    _adjust(scores, seen, rows, row, wanted, self._exclude_seen)
                total += float(ndcg_at(scores, row, wanted, K).sum())
        network.train()
        return total / max(self.num_users, 1)

    def _seen(self, network: "ScoringNetwork", batch: Batch) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return (question, item, bias) of every owned pair."""
        if batch.own is None or not batch.own.num_pairs:
            return None
        owned = batch.own.count > 0
        question, item = pair_questions(batch.own), pair_items(batch.own)
        if network.own_items is None:
            bias = torch.zeros_like(batch.own.count)
        else:
            bias = own_bias(network, batch, batch.own).float()
        return question[owned], item[owned], bias[owned]


def ndcg_at(scores: Tensor, target_question: Tensor, target_item: Tensor, k: int) -> Tensor:
    """Return NDCG@k of each question, [Q]; a target ranks below every other item of its score.

    The ideal is min(targets, k) hits at the top. A score that is no number counts as the worst.

    Args:
        scores: float32 [Q, I], -inf where an item is left out.
        target_question: int64 [M], non-decreasing.
        target_item: int64 [M].
        k: how deep.
    """
    scores = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    own = scores[target_question, target_item]
    others = scores.clone()
    others[target_question, target_item] = -torch.inf
    best = others.topk(min(k, scores.shape[1]), dim=-1).values
    above = (best[target_question] >= own[:, None]).sum(-1)

    order = own.argsort(descending=True, stable=True)
    order = order[target_question[order].argsort(stable=True)]
    count = torch.bincount(target_question, minlength=len(scores))
    first = count.cumsum(0) - count
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    rank = above + place - first[target_question]

    gain = 1.0 / torch.log2(torch.arange(k, device=scores.device) + 2.0)
    reached = torch.where(rank < k, gain[rank.clamp(max=k - 1)], 0.0)
    ideal = torch.cat((gain.new_zeros(1), gain.cumsum(0)))[count.clamp(max=k)]
    dcg = torch.zeros_like(scores[:, 0]).index_add(0, target_question, reached)
    return torch.where(count > 0, dcg / ideal.clamp(min=1e-9), 0.0)


def _first_timestamp(dataset: "Dataset", users: Ints, start: Ints, end: Ints) -> Ints:
    """Return how many events each user has at the first timestamp of start..end-1. [U]."""
    base = np.asarray(dataset.histories.offsets)[users]
    timestamp = np.asarray(dataset.histories.timestamp)
    rows = ragged_arange(base + start, end - start)
    same = timestamp[rows] == np.repeat(timestamp[base + start], end - start)
    return np.bincount(np.repeat(np.arange(len(users)), end - start), weights=same, minlength=len(users)).astype(int)


def _ask(
    dataset: "Dataset", config: RunConfig, users: Ints, cut: Ints, size: Ints, random: np.random.Generator
) -> Asked:
    histories, model = dataset.histories, config.model
    base = np.asarray(histories.offsets)[users]
    target_time = np.asarray(histories.timestamp[base + cut], dtype=np.int64)
    time = target_time
    if config.loss.request_time == "drawn":
        last = np.asarray(histories.timestamp[base + np.maximum(cut - 1, 0)], dtype=np.int64)
        time = random.integers(last, target_time, endpoint=True)
    batch = questions_batch(
        histories,
        users,
        np.arange(len(users)),
        cut,
        time,
        chunk_size=model.chunk_size,
        max_length=config.data.max_length,
        own_items=model.own_item_bias or config.evaluate.exclude_seen,
        features=EventFeatures.of(model),
        telling=question_features(histories, model),
    )
    item = np.asarray(histories.item_index[ragged_arange(base + cut, size)], dtype=np.int64)
    question = np.repeat(np.arange(len(users)), size)
    pairs = np.unique(np.stack((question, item), axis=1)[item != UNKNOWN_ITEM], axis=0)
    targets = torch.from_numpy(pairs[:, 0].copy()), torch.from_numpy(pairs[:, 1].copy())
    return Asked(batch, *targets, torch.from_numpy(target_time))


def _within(seen: tuple[Tensor, Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, item, bias) of the owned pairs of these questions."""
    question, item, bias = seen
    inside = (question >= rows.start) & (question < rows.stop)
    return question[inside] - rows.start, item[inside], bias[inside]


def _adjust(
    scores: Tensor,
    seen: tuple[Tensor, Tensor, Tensor],
    rows: slice,
    target_row: Tensor,
    target_item: Tensor,
    exclude_seen: bool,
) -> None:
    """Add the own-item bias to the scores of these rows; under a seen filter leave out what is no target."""
    row, owned, bias = _within(seen, rows)
    scores[row, owned] += bias
    if exclude_seen:
        kept = scores[target_row, target_item]
        scores[row, owned] = -torch.inf
        scores[target_row, target_item] = kept
