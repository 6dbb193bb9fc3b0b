# pyright: standard
"""Columns of items.parquet that hold lists, as arrays. Torch-free."""

from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys_ksa.data.jagged_arrays import Lists
from recsys_ksa.errors import DataError


class Categories(Lists):
    """The categories of each item, jagged: rows of a vocabulary, ascending within an item."""

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self:
        """Read a column list<int32>."""
        lists = column.combine_chunks()
        offsets = lists.offsets.to_numpy().astype(np.int64)
        return cls(offsets - offsets[0], lists.flatten().to_numpy().astype(np.int32))


def vectors_of(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Read a column fixed_size_list<float>, float32 [I, D].

    Raises:
        DataError: it is none.
    """
    lists = column.combine_chunks()
    if not pa.types.is_fixed_size_list(lists.type):
        raise DataError(f"items.parquet: expected vectors of one length, got {lists.type}. Prepare the data set again.")
    return lists.flatten().to_numpy().astype(np.float32).reshape(-1, lists.type.list_size)
