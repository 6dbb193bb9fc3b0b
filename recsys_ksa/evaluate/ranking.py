"""Full ranking in chunks of bounded memory: scorer -> ranks of all targets.

A scorer scores every item of the vocabulary for a chunk of questions; nothing is sampled. Q questions, M targets,
I items.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_ksa.evaluate.metrics import TOP, Pairs, target_ranks
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import Questions, RequestTime
from recsys_ksa.evaluate.tiles import top_k
from recsys_ksa.progress import progress

MAX_SCORES = 1 << 24
"""Most scores held at once (64 MiB)."""
MAX_WORKERS = 4
"""Most scorers that rank at once, each with scores of its own."""
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
    top: NDArray[np.int32]
    """[Q, 10] item_index of the first ten items; 0 where a seen filter leaves fewer."""


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


@dataclass(frozen=True)
class Chunk:
    """Some of the questions, their targets, and what their users had, on one device."""

    questions: Questions
    targets: Pairs
    owned: Pairs
    distance: Tensor
    """int64 [M], how many events ago the target was last met; 0: never."""

    @staticmethod
    def of(questions: Questions, ownership: Ownership, device: torch.device) -> "Chunk":
        """Gather the chunk of these questions."""
        had = ownership.before(questions)
        owned = Pairs(torch.from_numpy(had.question).to(device), torch.from_numpy(had.item).to(device))
        targets = Pairs(
            torch.from_numpy(questions.target_question).to(device), torch.from_numpy(questions.target_item).to(device)
        )
        return Chunk(questions, targets, owned, torch.from_numpy(ownership.last_met(questions)).to(device))

    def scores(self, scorer: Scorer, *, exclude_seen: bool) -> Tensor:
        """Return the scorer's scores after the seen filter, float32 [Q, I + 1]; the filter never takes a target."""
        scores = scorer.scores(self.questions).to(self.targets.item.device)
        if exclude_seen:
            kept = scores[self.targets.question, self.targets.item]
            scores[self.owned.question, self.owned.item] = -torch.inf
            scores[self.targets.question, self.targets.item] = kept
        return scores


def rank_targets(
    scorers: Sequence[Scorer],
    questions: Questions,
    ownership: Ownership,
    num_items: int,
    *,
    exclude_seen: bool,
    device: torch.device | str = "cpu",
) -> tuple[list[Ranks], NDArray[np.int64]]:
    """Rank all targets of all questions by each scorer; also return how many events ago each was last met, int64 [M].

    Args:
        scorers: give the scores.
        questions: what is asked.
        ownership: of the same histories.
        num_items: I, without the padding item.
        exclude_seen: leave out of the ranking what the user had, targets excepted.
        device: where ranks are counted.
    """
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in scorers]
    distance = [torch.zeros(0, dtype=torch.int64)]
    parts = list(chunks(questions, num_items))

    def rank(chunk: Chunk, scorer: Scorer) -> tuple[Tensor, ...]:
        scores = chunk.scores(scorer, exclude_seen=exclude_seen)
        among_all, among_list = target_ranks(scores, chunk.targets, chunk.owned, chunk.distance > 0)
        return among_all.cpu(), among_list.cpu(), first_items(scores).cpu()

    # Sorting and gathering run outside Python's lock: scorers share the cores of a CPU.
    workers = 1 if torch.device(device).type != "cpu" else min(MAX_WORKERS, torch.get_num_threads())
    with ThreadPoolExecutor(workers) as pool:
        for part in progress(parts, f"ranking all items: {questions.protocol} {questions.part}", unit="chunk"):
            chunk = Chunk.of(part, ownership, torch.device(device))
            distance.append(chunk.distance.cpu())
            for ranks, pair in zip(found, pool.map(partial(rank, chunk), scorers)):
                ranks.append(pair)
    return [Ranks(*(torch.cat(part).numpy() for part in zip(*ranks))) for ranks in found], torch.cat(distance).numpy()


def first_items(scores: Tensor) -> Tensor:
    """Return the item_index of each row's `TOP` best items, int32 [Q, TOP]; 0 where fewer have a score. [Q, I + 1]."""
    value, index = top_k(scores[:, 1:], min(TOP, scores.shape[1] - 1))
    top = torch.zeros(len(scores), TOP, dtype=torch.int32, device=scores.device)
    top[:, : index.shape[1]] = torch.where(value > -torch.inf, index + 1, 0).to(torch.int32)
    return top
