"""What a question tells beside the history: features of the user, hour and weekday of the request.

A question's features are rows of one table, each with a weight: an hour, a category, a number's bucket weigh 1, each of
the n categories of a list 1 / n. They enter the last block's query, where the time since the last event does, so that
no row of a user state depends on them. Training, evaluation, `Recommender` and the service all call
`QuestionFeatures.rows`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.data.jagged_arrays import Ints, Lists, offsets_of, ragged_arange
from recsys_ksa.features.calendar import NOT_SHOWN, ROWS, CalendarFeature, calendar_rows
from recsys_ksa.features.users import UserColumns, UserFeature
from recsys_ksa.features.values import value_buckets

if TYPE_CHECKING:
    from recsys_ksa.config import ModelConfig

# Letters: Q questions, U users, n rows of all questions.


@dataclass(frozen=True)
class WeightedRows:
    """Rows of one table, jagged: those of question q are offsets[q] up to offsets[q + 1]."""

    row: Ints
    """[n]."""
    weight: NDArray[np.float32]
    """[n]."""
    offsets: Ints
    """[Q + 1]."""


@dataclass(frozen=True)
class QuestionFeatures:
    """The features that are on; nothing by default.

    calendar: of the request's time.
    users: of the user, by name.
    edges: of those that are numbers, ascending.
    """

    calendar: tuple[CalendarFeature, ...] = ()
    users: Mapping[str, UserFeature] = field(default_factory=dict)
    edges: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @staticmethod
    def of(config: "ModelConfig", known: Mapping[str, UserFeature]) -> "QuestionFeatures":
        """Return the features that a network's config turns on, of those that a data set knows of its users."""
        users = {name: known[name] for name in config.user_features if name in known}
        return QuestionFeatures(config.request_calendar, users, config.user_edges)

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each feature in the table, by name, in order; the first of each is "none"."""
        rows = {f"request_{name}": ROWS[name] for name in self.calendar}
        for name, feature in self.users.items():
            rows[f"user_{name}"] = 2 + len(self.edges[name]) if feature.kind == "number" else feature.num_categories
        return rows

    def rows(
        self,
        users: UserColumns | None,
        user: Ints,
        request_time: Ints,
        shown: NDArray[np.bool_],
        told: NDArray[np.bool_] | None = None,
    ) -> WeightedRows | None:
        """Return each question's rows; None where no feature is on.

        Args:
            users: features of U users, all that are on; None where none is.
            user: whose question it is, 0 to U - 1, [Q].
            request_time: Unix seconds, [Q].
            shown: whether the network is shown that time, [Q].
            told: whether it is told of the user, [Q]; None: always.
        """
        if not self.num_rows:
            return None
        everyone = np.arange(len(user))
        told = np.ones(len(user), dtype=bool) if told is None else told
        parts: list[tuple[Ints, Ints, NDArray[np.float32]]] = []
        first = dict(zip(self.num_rows, offsets_of(np.array([*self.num_rows.values()])).tolist()))
        for name in self.calendar:
            row = np.where(shown, calendar_rows(name, request_time), NOT_SHOWN)
            parts.append((everyone, first[f"request_{name}"] + row, np.ones(len(row), np.float32)))
        for name, feature in self.users.items():
            assert users is not None
            column, question = users.columns[name], everyone
            if isinstance(column, Lists):
                count = np.where(told, np.diff(column.offsets)[user], 0)
                row, question = column.index[ragged_arange(column.offsets[user], count)], np.repeat(everyone, count)
                weight = np.repeat(1 / np.maximum(count, 1), count).astype(np.float32)
            else:
                number = feature.kind == "number"
                row = value_buckets(column.astype(np.float64), self.edges[name]) if number else column
                row, weight = np.where(told, row[user], 0), np.ones(len(user), np.float32)
            parts.append((question, first[f"user_{name}"] + row, weight))
        question, row, weight = (np.concatenate(each) for each in zip(*parts))
        order = np.argsort(question, kind="stable")
        return WeightedRows(row[order], weight[order], offsets_of(np.bincount(question, minlength=len(user))))
