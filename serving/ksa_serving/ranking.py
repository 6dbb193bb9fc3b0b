"""From user vectors to ranked items: one pass of the network and one search for many questions. Imports torch."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksa_serving.models import Question, Scored
from recsys_ksa.recommender import Recommender, owned_items
from recsys_ksa.retrieval.index import Found, TorchIndex
from recsys_ksa.schema import UNKNOWN_ITEM

SEARCHED_AT_ONCE = 16
"""Users whose scores of all items are in memory at once, on a CPU."""
SCORED_AT_ONCE = 1 << 28
"""Scores in memory at once on an accelerator."""


def rank_items(recommender: Recommender, questions: Sequence[Question]) -> list[Scored]:
    """Return the answers to questions; equals asking one by one."""
    told = [(asked.state, asked.request_time, asked.user) for asked in questions]
    vectors = recommender.user_vectors(*zip(*told))
    index = recommender.index
    if isinstance(index, TorchIndex) and index.vectors.device.type != "cpu":
        return rank_on_device(recommender, questions, vectors)
    found = _search(recommender, questions, vectors)
    vectors = vectors.to("cpu", torch.float32)
    return [_ranked(recommender, asked, vector, rows) for asked, vector, rows in zip(questions, vectors, found)]


def _search(recommender: Recommender, questions: Sequence[Question], vectors: Tensor) -> list[Found | None]:
    """Search for several users at once where the index is a matrix: its rows are read once for all of them."""
    index = recommender.index
    if not isinstance(index, TorchIndex) or len(questions) == 1:
        return [None] * len(questions)
    found: list[Found | None] = []
    for start in range(0, len(questions), SEARCHED_AT_ONCE):
        part = questions[start : start + SEARCHED_AT_ONCE]
        scores_UI = vectors[start : start + SEARCHED_AT_ONCE].to(index.vectors) @ index.vectors.T
        scores_UI[:, UNKNOWN_ITEM] = -torch.inf
        owned = [asked.state.seen.item_index for asked in part]
        users = np.repeat(np.arange(len(part)), [len(items) for items in owned])
        items = np.concatenate(owned).astype(np.int64)
        scores_UI[torch.from_numpy(users), torch.from_numpy(items)] = -torch.inf
        best = scores_UI.topk(min(max(map(_depth, part)), scores_UI.shape[1]))
        for asked, rows, values in zip(part, best.indices.cpu().numpy(), best.values.cpu().numpy()):
            depth = min(_depth(asked), int(np.isfinite(values).sum()))
            found.append((rows[:depth], values[:depth]))
    return found


def rank_on_device(recommender: Recommender, questions: Sequence[Question], vectors: Tensor) -> list[Scored]:
    """Return what `rank_items` does, all items' scores and the own items' computed where the index's matrix is.

    Args:
        vectors: user vectors, [U, E (+ 1)].
    """
    index = recommender.index
    assert isinstance(index, TorchIndex)
    unnamed = torch.from_numpy(recommender.unnamed).to(index.vectors.device)
    at_once = max(1, SCORED_AT_ONCE // len(index.vectors))
    found: list[Scored] = []
    for start in range(0, len(questions), at_once):
        part, users_UE = questions[start : start + at_once], vectors[start : start + at_once].to(index.vectors)
        scores_UI = users_UE @ index.vectors.T
        _put_own_items(recommender, part, users_UE, index.vectors, scores_UI)
        scores_UI[:, unnamed] = -torch.inf
        best = scores_UI.topk(min(max(map(_depth, part)), scores_UI.shape[1]))
        answers = zip(part, best.indices.cpu().numpy(), best.values.cpu().numpy())
        found += [_named(recommender, asked, rows, values) for asked, rows, values in answers]
    return found


def _put_own_items(
    recommender: Recommender, part: Sequence[Question], users_UE: Tensor, items_IE: Tensor, scores_UI: Tensor
) -> None:
    """Give the users' own items their scores in answers that may hold them, and none in the others; in place."""
    device = scores_UI.device
    scores_UI[torch.tensor([asked.only_seen for asked in part], device=device)] = -torch.inf
    left_out = [_leaves_out(recommender, asked) for asked in part]
    for hidden in (True, False):
        chosen = [user for user, out in enumerate(left_out) if out is hidden]
        if not chosen:
            continue
        states, rows = [part[user].state for user in chosen], torch.tensor(chosen, device=device)
        users, items = owned_items(states, device)
        if hidden:
            scores_UI[rows[users], items] = -torch.inf
        else:
            times = [part[user].request_time for user in chosen]
            own = recommender.owned_scores(states, users, items, users_UE[rows], times, items_IE)
            scores_UI[rows[users], items] = own


def _named(recommender: Recommender, asked: Question, rows: NDArray[np.int64], values: NDArray[np.float32]) -> Scored:
    """Return an answer of items found, the best first, equal scores by item index."""
    if asked.allow is not None:
        return _among(recommender, asked, asked.allow)
    order = np.lexsort((rows, -values))[: int(np.isfinite(values).sum())]
    named = [(str(recommender.run.items.item_id[rows[at]]), float(values[at])) for at in order]
    return [pair for pair in named if pair[0] not in asked.deny][: asked.k]


def _leaves_out(recommender: Recommender, asked: Question) -> bool:
    """Return whether an answer has none of the user's own items."""
    default = recommender.run.info.exclude_seen and not asked.only_seen
    return default if asked.exclude_seen is None else asked.exclude_seen


def _ranked(recommender: Recommender, asked: Question, vector: Tensor, found: Found | None) -> Scored:
    if asked.allow is not None:
        return _among(recommender, asked, asked.allow)
    ranked = recommender.rank(
        asked.state, vector, _depth(asked), asked.request_time, asked.exclude_seen, asked.only_seen, found
    )
    return [pair for pair in ranked if pair[0] not in asked.deny][: asked.k]


def _among(recommender: Recommender, asked: Question, allow: frozenset[str]) -> Scored:
    """Score the allowed items directly; the filters hold as in a search."""
    index_of = recommender.run.items.index_of
    owned = set(asked.state.seen.item_index.tolist())
    exclude = _leaves_out(recommender, asked)
    allowed = [item for item in allow - asked.deny if item in index_of]
    if exclude:
        allowed = [item for item in allowed if index_of[item] not in owned]
    if asked.only_seen:
        allowed = [item for item in allowed if index_of[item] in owned]
    scores = recommender.score(asked.state, allowed, asked.request_time, asked.user)
    known = [(item, score) for item, score in zip(allowed, scores) if score is not None]
    return sorted(known, key=lambda pair: (-pair[1], index_of[pair[0]]))[: asked.k]


def _depth(asked: Question) -> int:
    """Return how many items hold k that are not denied: at most as many are lost as are denied."""
    return asked.k + len(asked.deny)
