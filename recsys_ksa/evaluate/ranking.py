"""Full ranking in chunks of bounded memory: scorer -> ranks of all targets.

A scorer scores every item of the vocabulary for a chunk of questions; nothing is sampled. Q questions, M targets,
I items.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_ksa.evaluate.metrics import target_ranks
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import Questions, RequestTime

MAX_SCORES = 1 << 24
"""Most scores held at once (64 MiB)."""
MAX_EVENTS = 1 << 22
"""Most known events looked through at once."""


class Scorer(Protocol):
    """Anything that scores all items for questions."""

    @property
    def name(self) -> str:
        """`ksa`, `full`, `window`, `truncated` or a baseline's name."""
        ...

    @property
    def request_time(self) -> RequestTime | None:
        """The request time it is shown; None for what knows of none."""
        ...

    def scores(self, questions: Questions) -> Tensor:
        """Return float32 [Q, I + 1], a new tensor; column 0, the padding item, means nothing."""
        ...


@dataclass(frozen=True)
class Ranks:
    """Where a scorer put each target; int64 [M], from 1."""

    all_items: NDArray[np.int64]
    """Among all items (all not seen, with a seen filter)."""
    own_list: NDArray[np.int64]
    """Among the items the user had, for a target the user had; else among the items the user never had."""


def chunks(questions: Questions, num_items: int) -> Iterator[Questions]:
    """Cut the table into chunks whose scores and known events fit the bounds; at least one question each."""
    known = np.cumsum(questions.cut)
    rows = max(1, MAX_SCORES // (num_items + 1))
    start = 0
    while start < len(questions):
        before = known[start - 1] if start else 0
        by_events = int(np.searchsorted(known, before + MAX_EVENTS, side="right"))
        stop = min(len(questions), start + rows, max(by_events, start + 1))
        yield questions.slice(start, stop)
        start = stop


def repeats(questions: Questions, ownership: Ownership, num_items: int) -> NDArray[np.bool_]:
    """Return whether the user had each target before, bool [M]."""
    found = [np.empty(0, dtype=bool)]
    for chunk in chunks(questions, num_items):
        owned = ownership.before(chunk)
        keys = owned.question * (num_items + 1) + owned.item
        found.append(np.isin(chunk.target_question * (num_items + 1) + chunk.target_item, keys))
    return np.concatenate(found)


def rank_chunk(
    scorer: Scorer, chunk: Questions, ownership: Ownership, *, exclude_seen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Score a chunk: float32 [Q, I + 1] after the seen filter, and the ranks of its targets, int64 [M] twice.

    The seen filter takes away what the user had, but never a target.
    """
    scores = scorer.scores(chunk)
    device = scores.device
    pairs = ownership.before(chunk)
    owned = torch.zeros(scores.shape, dtype=torch.bool, device=device)
    owned[torch.from_numpy(pairs.question).to(device), torch.from_numpy(pairs.item).to(device)] = True
    target_question = torch.from_numpy(chunk.target_question).to(device)
    target_item = torch.from_numpy(chunk.target_item).to(device)
    if exclude_seen:
        hidden = owned.clone()
        hidden[target_question, target_item] = False
        scores.masked_fill_(hidden, -torch.inf)
    ranks, list_ranks = target_ranks(scores, target_question, target_item, owned)
    return scores, ranks, list_ranks


def rank_targets(
    scorer: Scorer, questions: Questions, ownership: Ownership, num_items: int, *, exclude_seen: bool
) -> Ranks:
    """Rank all targets of all questions.

    Args:
        scorer: gives the scores.
        questions: what is asked.
        ownership: of the same histories.
        num_items: I, without the padding item.
        exclude_seen: leave out of the ranking what the user had, targets excepted.
    """
    ranks, list_ranks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for chunk in chunks(questions, num_items):
        _, among_all, among_list = rank_chunk(scorer, chunk, ownership, exclude_seen=exclude_seen)
        ranks.append(among_all.cpu().numpy())
        list_ranks.append(among_list.cpu().numpy())
    return Ranks(np.concatenate(ranks), np.concatenate(list_ranks))
