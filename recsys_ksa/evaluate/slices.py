"""Parts of the targets that are looked at apart, and the per-user values of every metric on them.

Q questions, M targets, U users asked, C columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.evaluate.lists import ListMetrics
from recsys_ksa.evaluate.metrics import METRICS, question_metrics, user_means
from recsys_ksa.evaluate.protocol import Questions, RequestTime
from recsys_ksa.evaluate.ranking import Ranks

if TYPE_CHECKING:
    from recsys_ksa.config import ModelConfig

LENGTHS = (0, 16, 64, 256, 1024, 4096, 16384, 65536, 1 << 30)
"""Where slices by history length begin; each ends one event before the next."""


@dataclass(frozen=True)
class Slice:
    """Which targets count, and in which ranking."""

    name: str
    kept: NDArray[np.bool_]
    """[M]"""
    in_list: bool = False
    """Whether targets are ranked in their own list ("again", "new for you") instead of among all items."""


@dataclass(frozen=True)
class Column:
    """What one column of values holds."""

    model: str
    request_time: RequestTime | None
    slice: str
    metric: str


def slices(
    questions: Questions, distance: NDArray[np.int64], config: "ModelConfig", *, exclude_seen: bool
) -> list[Slice]:
    """Return the slices that hold a target.

    - `all`: every target, all items in one ranking.
    - `new` and `repeat`: a question's set splits into targets that the user never had and targets that the user had,
      each ranked in the list that is served for it: new ones ("new for you") among the items the user never had,
      repeated ones ("again") among those the user had. In the one ranking of `all`, whatever puts owned items first
      would score 0 on every first purchase. Under a seen filter there is one list, and both are ranked in it.
    - `gap-0` and `gap-positive` (tie-ordered `loo-classic` only): seconds from the last known event to the target.
    - `length-LO-HI`: events known to the question, both ends included.
    - `distance-window`, `-stacked-window`, `-beyond`: where the target was last met, ranked in its list as above: in
      the chunks that the question sees as events; in those that the windows of all layers reach, one upon the other;
      before them. `distance-never`: nowhere, as `new`.

    Args:
        questions: what was asked.
        distance: how many events ago the user last met the target, int64 [M]; 0: never.
        config: of the model whose window is meant.
        exclude_seen: whether the ranking leaves out what the user had.
    """
    every, repeat = np.ones(len(distance), dtype=bool), distance > 0
    two_lists = not exclude_seen
    found = [Slice("all", every), Slice("new", ~repeat, two_lists), Slice("repeat", repeat, two_lists)]
    question = questions.target_question
    if questions.protocol == "loo-classic":
        tied = (questions.gap == 0)[question]
        found += [Slice("gap-0", tied), Slice("gap-positive", ~tied)]
    length = questions.cut[question]
    for low, end in pairwise(LENGTHS):
        found.append(Slice(f"length-{low}-{end - 1}", (low <= length) & (length < end)))
    chunks_ago = (length - 1) // config.chunk_size - (length - distance) // config.chunk_size
    window, stacked = config.window_chunks, config.window_chunks * len(config.layers)
    found += [
        Slice("distance-never", ~repeat, two_lists),
        Slice("distance-window", repeat & (chunks_ago <= window), two_lists),
        Slice("distance-stacked-window", repeat & (chunks_ago > window) & (chunks_ago <= stacked), two_lists),
        Slice("distance-beyond", repeat & (chunks_ago > max(window, stacked)), two_lists),
    ]
    return [part for part in found if part.kept.any()]


def columns(
    questions: Questions,
    ranked: Sequence[tuple[str, RequestTime | None, Ranks]],
    parts: Sequence[Slice],
    lists: ListMetrics,
) -> tuple[list[Column], NDArray[np.float64]]:
    """Return every metric of every model and slice, one row a user. C columns, float64 [U, C].

    Metrics of the lists are of the slice `all`.

    A user's value is the mean over the user's questions; NaN where the user has none in the slice.

    Args:
        questions: what was asked.
        ranked: (model, request time, ranks).
        parts: the slices.
        lists: measures the lists.
    """
    users, user = np.unique(questions.user, return_inverse=True)
    names: list[Column] = []
    values = []
    for model, request_time, ranks in ranked:
        measured = [("all", metric, value) for metric, value in lists.of_questions(ranks.top, questions).items()]
        for part, metric, value in (*_question_values(questions, ranks, parts), *measured):
            names.append(Column(model, request_time, part, metric))
            values.append(user_means(value, user, len(users)))
    return names, np.stack(values, axis=1)


def _question_values(
    questions: Questions, ranks: Ranks, parts: Sequence[Slice]
) -> Iterator[tuple[str, str, NDArray[np.float64]]]:
    for part in parts:
        rank = ranks.own_list if part.in_list else ranks.all_items
        by_metric = question_metrics(rank, questions.target_question, len(questions), part.kept)
        for metric in METRICS:
            yield part.name, metric, by_metric[metric]
