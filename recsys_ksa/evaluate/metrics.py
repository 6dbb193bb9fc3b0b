"""Metrics from the ranks of targets: pure functions, exact ranks, ties counted against us.

hr@10 is any hit, recall@10 hits/|set|, ndcg@10 normalised by the ideal of min(|set|, 10) hits, mrr one over the rank
of the best target. Q questions, M targets, I items, U users.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

METRICS = ("ndcg@10", "hr@10", "recall@10", "mrr")
TOP = 10
_COMPARED = 1 << 23
"""Most score comparisons held at once (one byte each, twice)."""


def target_ranks(
    scores: Tensor, target_question: Tensor, target_item: Tensor, owned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return each target's rank among all items, and among the items of its own list. int64 [M] twice, from 1.

    A target stands behind every other item whose score is not below its own (so a NaN ranks last), but among targets
    of one question equal scores take turns. The padding item, column 0, is never ranked. The list of a target is the
    items its user had (`owned`) if it is one of them, else the items the user never had.

    Args:
        scores: float32 [Q, I + 1].
        target_question: int64 [M], rows of `scores`, non-decreasing.
        target_item: int64 [M], columns of `scores`; each once a question.
        owned: bool [Q, I + 1]; without it both ranks are the same.
    """
    ranks, list_ranks = torch.empty_like(target_item), torch.empty_like(target_item)
    step = max(1, _COMPARED // scores.shape[1])
    for start in range(0, len(target_item), step):
        question, item = target_question[start : start + step], target_item[start : start + step]
        mine = scores[question, item]
        ahead = ~(scores[question] < mine[:, None])
        ahead[:, 0] = False
        ranks[start : start + step] = ahead.sum(dim=1)
        if owned is not None:
            among = ahead & (owned[question] == owned[question, item][:, None])
            list_ranks[start : start + step] = among.sum(dim=1)
    # Tied targets were counted against each other: the first of them need not wait for the later ones.
    mine = scores[target_question, target_item]
    unknown = target_item == 0
    ranks = (ranks - _later_ties(mine, target_question)).masked_fill(unknown, scores.shape[1])
    if owned is None:
        return ranks, ranks
    group = 2 * target_question + owned[target_question, target_item]
    return ranks, (list_ranks - _later_ties(mine, group)).masked_fill(unknown, scores.shape[1])


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
        target_question: int64 [M].
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
    np.minimum.at(best, target_question, rank.astype(np.float64))
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
