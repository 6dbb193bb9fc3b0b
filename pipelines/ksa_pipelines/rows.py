"""Histories on disk as Arrow files that are mapped: one row a user, users by index, read forward.

`recsys_ksa.data.parts.blocks` merges them as it merges Parquet parts, at a fraction of the work. Pages that were read
are given back, so that a file counts with what is looked at now and not with its size.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ksa_pipelines.arrow import write_table
from recsys_ksa.data.parts import sizes_of

ROWS = "rows.arrow"
"""A bucket's rows, in its folder."""


class MappedTable:
    """An Arrow file as a table; holds no memory of its own."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.table: pa.Table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map))).read_all()

    def release(self) -> None:
        """Give the pages back; what is read again comes from the disk's cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


class RowsFile:
    """Rows of a bucket: a source of `parts.blocks`."""

    def __init__(self, path: Path) -> None:
        self._mapped = MappedTable(path)
        table = self._mapped.table
        self.schema: pa.Schema = table.schema
        self.users: NDArray[np.int64] = table.column("user_index").to_numpy().copy()
        self.newest = np.ones(len(self.users), dtype=bool)
        self.num_events = len(table.column("item_index").chunk(0).values)
        self._row = 0

    def sizes(self) -> tuple[int, int]:
        """Return the events and the bytes of user ids of all rows."""
        sizes = sizes_of(self._mapped.table, self.newest)
        self._mapped.release()
        return sizes

    def before(self, user_index: int) -> pa.Table | None:
        """Return the next rows up to, without, `user_index`, or None."""
        first, self._row = self._row, int(np.searchsorted(self.users, user_index))
        if self._row == first:
            return None
        rows = self._mapped.table.slice(first, self._row - first)
        copied = pa.table([pa.concat_arrays(column.chunks) for column in rows.columns], schema=rows.schema)
        self._mapped.release()
        return copied


def write_rows(histories: pa.Table, folder: Path) -> None:
    """Write a bucket's rows, users by index, into its folder."""
    write_table(histories, folder / ROWS)


def open_rows(folders: Sequence[Path]) -> list[RowsFile]:
    """Return the rows of some buckets."""
    return [RowsFile(folder / ROWS) for folder in folders]
