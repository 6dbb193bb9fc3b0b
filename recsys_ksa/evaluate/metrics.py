"""Metrics from the ranks of targets: pure functions, exact ranks, ties counted against us.

hr@10 is any hit, recall@10 hits/|set|, ndcg@10 normalised by the ideal of min(|set|, 10) hits, mrr one over the rank
of the best target. Q questions, M targets, I items, U users.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

METRICS = ("ndcg@10", "hr@10", "recall@10", "mrr")
TOP = 10
FEW_TARGETS = 4
"""Targets of a question up to which counting beats sorting the scores."""


@dataclass(frozen=True)
class Pairs:
    """(question, item) pairs as tensors, ordered by question."""

    question: Tensor
    """int64 [P]"""
    item: Tensor
    """int64 [P]"""


def target_ranks(scores: Tensor, targets: Pairs, owned: Pairs, is_owned: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's rank among all items, and among the items of its own list. int64 [M] twice, from 1.

    A target stands behind every other item whose score is not below its own (and a NaN behind all), but among targets
    of one question equal scores take turns. The padding item, column 0, is never ranked. The list of a target is the
    items its user had (`owned`) if it is one of them, else the items the user never had.

    Args:
        scores: float32 [Q, I + 1].
        targets: M of them, each once a question.
        owned: P of them, each once a question, never the padding item.
        is_owned: bool [M], whether the target is one of them.
    """
    num_items = scores.shape[1] - 1
    mine = scores[targets.question, targets.item]
    ahead = _not_below(scores[:, 1:], targets.question, mine)
    table, lengths = _padded(scores[owned.question, owned.item], owned.question, len(scores), -torch.inf)
    # Padding is not below a target of -inf, the only one it could stand before.
    ahead_owned = torch.minimum(_not_below(table, targets.question, mine), lengths[targets.question])
    in_list = torch.where(is_owned, ahead_owned, ahead - ahead_owned)
    # Tied targets were counted against each other: the first of them need not wait for the later ones.
    unknown = targets.item == 0
    ranks = ahead - _later_ties(mine, targets.question)
    list_ranks = in_list - _later_ties(mine, 2 * targets.question + is_owned)
    return ranks.masked_fill(unknown, num_items + 1), list_ranks.masked_fill(unknown, num_items + 1)


def _not_below(scores: Tensor, question: Tensor, value: Tensor) -> Tensor:
    """Return how many scores of the question's row are not below `value`, itself among them. [Q, N], [M] -> [M]."""
    if not scores.shape[1] or not len(value):
        return torch.zeros_like(question)
    asked, lengths = _padded(value, question, len(scores), 0.0)
    if asked.shape[1] <= FEW_TARGETS:
        counts = torch.stack([_count_below(scores, column[:, None]) for column in asked.unbind(1)], dim=1)
        below = counts[torch.arange(asked.shape[1], device=value.device) < lengths[:, None]]
        return torch.where(value.isnan(), scores.shape[1], scores.shape[1] - below)
    # numpy sorts float32 rows many times faster than torch does on a CPU; both put NaN last.
    ascending = (
        torch.sort(scores, dim=1).values.contiguous()
        if scores.is_cuda
        else torch.from_numpy(np.sort(scores.numpy(), axis=1))
    )
    ascending.masked_fill_(ascending.isnan(), torch.inf)  # as little below a value; searchsorted takes NaN for less
    below = torch.searchsorted(ascending, asked)
    below = below[torch.arange(asked.shape[1], device=value.device) < lengths[:, None]]
    return torch.where(value.isnan(), scores.shape[1], scores.shape[1] - below)


def _count_below(scores: Tensor, value: Tensor) -> Tensor:
    """Return how many of a row's scores are below the row's value. [Q, N], [Q, 1] -> int64 [Q]."""
    if scores.is_cuda:
        return (scores < value).sum(dim=1)
    # numpy counts a row of booleans several times faster than torch sums one.
    return torch.from_numpy(np.count_nonzero(scores.numpy() < value.numpy(), axis=1))


def _padded(value: Tensor, row: Tensor, num_rows: int, padding: float) -> tuple[Tensor, Tensor]:
    """Lay values out by row: float32 [num_rows, longest], and the lengths, int64 [num_rows]. `row` is ascending."""
    lengths = torch.bincount(row, minlength=num_rows)
    place = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
    table = value.new_full((num_rows, int(lengths.max()) if len(row) else 0), padding)
    table[row, place] = value
    return table, lengths


def _later_ties(score: Tensor, group: Tensor) -> Tensor:
    """Return how many later targets of the same group have the same score, int64 [M]."""
    value, key = score.cpu().numpy(), group.cpu().numpy()
    order = np.lexsort((value, key))
    later = np.zeros(len(order), dtype=np.int64)
    if len(order):
        ends = (value[order[1:]] != value[order[:-1]]) | (key[order[1:]] != key[order[:-1]])
        last = np.append(np.flatnonzero(ends), len(order) - 1)
        run = np.concatenate(([0], np.cumsum(ends)))
        later[order] = last[run] - np.arange(len(order))
    return torch.from_numpy(later).to(score.device)


def question_metrics(
    rank: NDArray[np.int64],
    target_question: NDArray[np.int64],
    num_questions: int,
    kept: NDArray[np.bool_] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return each metric of each question, float64 [Q]; NaN where a question has no target left.

    Args:
        rank: of each target, int64 [M], from 1.
        target_question: int64 [M], ascending.
        num_questions: Q.
        kept: bool [M], the targets that count; the others are neither hits nor part of the ideal.
    """
    if kept is not None:
        rank, target_question = rank[kept], target_question[kept]
    size = np.bincount(target_question, minlength=num_questions)
    hit = rank <= TOP
    hits = np.bincount(target_question, weights=hit, minlength=num_questions)
    gain = np.where(hit, 1.0 / np.log2(rank + 1.0), 0.0)
    gained = np.bincount(target_question, weights=gain, minlength=num_questions)
    best = np.full(num_questions, np.inf)
    starts = np.flatnonzero(np.diff(target_question, prepend=-1))
    if len(starts):
        best[target_question[starts]] = np.minimum.reduceat(rank, starts)
    ideal = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(TOP) + 2.0))))
    asked = np.where(size > 0, 1.0, np.nan)
    whole = np.maximum(size, 1)
    return {
        "ndcg@10": asked * gained / np.maximum(ideal[np.minimum(size, TOP)], ideal[1]),
        "hr@10": asked * (hits > 0),
        "recall@10": asked * hits / whole,
        "mrr": asked / best,
    }


def user_means(value: NDArray[np.float64], user: NDArray[np.int64], num_users: int) -> NDArray[np.float64]:
    """Return each user's mean over their questions that have a value, float64 [U]; NaN without any.

    Args:
        value: float64 [Q], NaN where there is none.
        user: int64 [Q] in 0 .. num_users-1.
        num_users: U.
    """
    has = ~np.isnan(value)
    count = np.bincount(user[has], minlength=num_users)
    total = np.bincount(user[has], weights=value[has], minlength=num_users)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
