"""Features of users: one category, a list of categories, or a number each; in columns, whoever tells them.

The pipeline reads columns from a table of users, a request tells one user's values; `told_users` gives those as the
same columns. An unknown category is row 0 of its vocabulary; of a list it is left out. An unknown number is NaN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.data.jagged_arrays import Lists, offsets_of
from recsys_ksa.errors import DataError

UNKNOWN = 0
"""Row of a category that the vocabulary does not know."""
UserKind = Literal["category", "list", "number"]
Told = Mapping[str, object]
"""What is told of one user: a text or an integer, a list of them, or a number, by feature; None or missing: unknown."""
IndexOf = Mapping[str, Mapping[str, int]]
"""Row of each category, by feature."""


@dataclass(frozen=True)
class UserFeature:
    """One feature.

    num_categories: rows of its vocabulary, 0 (unknown) included; 0 of a number.
    """

    kind: UserKind
    num_categories: int = 0


@dataclass(frozen=True)
class UserColumns:
    """Features of U users, by name.

    features: what they are.
    columns: of a category int32 [U], of a number float64 [U], of a list U lists.
    """

    features: Mapping[str, UserFeature]
    columns: Mapping[str, "NDArray[np.int32] | NDArray[np.float64] | Lists"]


def told_users(told: Sequence[Told | None], features: Mapping[str, UserFeature], index_of: IndexOf) -> UserColumns:
    """Return what is told of U users as columns.

    Raises:
        DataError: a feature that is none of these, or a value that is not of its kind.
    """
    for one in told:
        if more := sorted(set(one or ()) - set(features)):
            have = ", ".join(features) or "none, as the run reads none"
            raise DataError(f"user: expected features of the run ({have}), got {more}. Leave them out.")
    columns: dict[str, NDArray[np.int32] | NDArray[np.float64] | Lists] = {}
    for name, feature in features.items():
        values = [(one or {}).get(name) for one in told]
        if feature.kind == "number":
            columns[name] = np.array([_number(name, value) for value in values], dtype=np.float64)
        elif feature.kind == "category":
            rows = [_row(_text(name, value), index_of[name]) for value in values]
            columns[name] = np.array(rows, dtype=np.int32)
        else:
            lists = [_rows(name, value, index_of[name]) for value in values]
            flat = np.array([row for rows in lists for row in rows], dtype=np.int32)
            columns[name] = Lists(offsets_of(np.array([len(rows) for rows in lists], dtype=np.int64)), flat)
    return UserColumns(features, columns)


def _row(text: str, index_of: Mapping[str, int]) -> int:
    return index_of.get(text, UNKNOWN)


def _rows(name: str, value: object, index_of: Mapping[str, int]) -> list[int]:
    """Return the rows of a list's known categories, each once, ascending."""
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise DataError(f"user: {name}: expected a list of texts or integers, got {value!r}.")
    return sorted({row for each in value if (row := _row(_text(name, each).strip(), index_of)) != UNKNOWN})


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
        raise DataError(f"user: {name}: expected a text, an integer or None, got {value!r}.")
    return str(value)


def _number(name: str, value: object) -> float:
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise DataError(f"user: {name}: expected a number or None, got {value!r}.")
    try:
        return float(value)
    except OverflowError:
        raise DataError(f"user: {name}: expected a number within float64, got one beyond it.") from None
