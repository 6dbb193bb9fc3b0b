# pyright: standard
"""users.parquet of a prepared data set, as columns beside the histories. Torch-free."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys_ksa.data.item_columns import Categories
from recsys_ksa.data.jagged_arrays import offsets_of, ragged_arange
from recsys_ksa.data.manifest import Manifest, check_file
from recsys_ksa.features.users import UserColumns, UserFeature
from recsys_ksa.schema import UNKNOWN_CATEGORY, user_column, user_vocabulary


def read_users(path: Path, manifest: Manifest, user_index: NDArray[np.int64]) -> UserColumns | None:
    """Return the features of given users, int64 [U]; None where the data set has no table of users.

    Who is not in the table has unknown categories, empty lists, and no numbers.

    Raises:
        DataError: a file is missing or altered.
    """
    if not manifest.user_features:
        return None
    table = pq.read_table(check_file(path, manifest, manifest.table_file("users.parquet")))
    described = table["user_index"].to_numpy()
    row = np.minimum(np.searchsorted(described, user_index), max(len(described) - 1, 0))
    there = described[row] == user_index if len(described) else np.zeros(len(user_index), dtype=bool)
    features: dict[str, UserFeature] = {}
    columns: dict[str, NDArray[np.int32] | NDArray[np.float64] | Categories] = {}
    for name, kind in manifest.user_features.items():
        column = table[user_column(name, kind)]
        if kind == "list":
            columns[name] = _taken(Categories.of(column), row, there)
        else:
            missing = np.nan if kind == "number" else UNKNOWN_CATEGORY
            given = column.to_numpy()
            values = np.full(len(row), missing, dtype=given.dtype)
            values[there] = given[row[there]]
            columns[name] = values
        rows = 0
        if kind != "number":
            file = manifest.table_file(f"vocab/{user_vocabulary(name)}.parquet")
            rows = pq.read_metadata(path / file).num_rows
        features[name] = UserFeature(kind, rows)
    return UserColumns(features, columns)


def _taken(lists: Categories, row: NDArray[np.int64], there: NDArray[np.bool_]) -> Categories:
    count = np.zeros(len(row), dtype=np.int64)
    count[there] = np.diff(lists.offsets)[row[there]]
    start = np.zeros(len(row), dtype=np.int64)
    start[there] = lists.offsets[row[there]]
    return Categories(offsets_of(count), lists.index[ragged_arange(start, count)])
