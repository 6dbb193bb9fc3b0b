"""The histories that a data set has, where an increment touches them: rows taken from `recsys_ksa.data.rows`."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from ksa_pipelines.arrow import find_texts
from ksa_pipelines.histories import lists_of
from recsys_ksa.data.rows import DIGEST, Rows, altered, altered_rows

UNKNOWN = -1
"""user_index and row of a user whom the data set does not know."""


class Stored:
    """The histories of some buckets. Rows count through its files, one after the other.

    Args:
        files: of their parts, a bucket's oldest first.
    """

    def __init__(self, files: Iterable[Rows]) -> None:
        self._files = tuple(files)
        self._by_bucket = defaultdict[int, list[Rows]](list)
        for file in self._files:
            self._by_bucket[file.bucket].append(file)
        self._ends = np.cumsum([0, *(len(file.users) for file in self._files)])

    def of(self, buckets: range) -> "Stored":
        """Return those of some buckets: what a task takes along."""
        return Stored(file for bucket in buckets for file in self._by_bucket.get(bucket, ()))

    def recognise(self, users: pl.DataFrame) -> pl.DataFrame:
        """Return users with user_index, row and num_events of their histories.

        Where the data set does not know the user these are -1, -1 and 0.

        Args:
            users: user_id, and what stays as it is.
        """
        ids = pa.chunked_array([file.column("user_id") for file in self._files], pa.string())
        place = find_texts(ids, users["user_id"])
        known = np.flatnonzero(place >= 0)
        row = np.full(users.height, UNKNOWN)  # finds what is appended below
        row[place[known]] = known  # of a user with several the last, which is the newest
        user_index = np.concatenate([*(file.users for file in self._files), [UNKNOWN]])
        lengths = np.concatenate([*(np.diff(file.offsets) for file in self._files), [0]])
        return users.with_columns(
            user_index=pl.Series(user_index[row]), row=pl.Series(row), num_events=pl.Series(lengths[row])
        )

    def last_times(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the time of the last event of some users."""
        found = np.empty(len(rows), dtype=np.int64)
        for file, which, here in self._by_file(rows):
            found[which] = file.column("timestamp").values.to_numpy()[file.offsets[here + 1] - 1]
            file.release()
        return found

    def events(self, rows: NDArray[np.int64], names: Sequence[str]) -> tuple[dict[str, pa.Array], NDArray[np.int64]]:
        """Return some lists of some users, of one at least, and their offsets; compared with nothing: `read` does that.

        Args:
            rows: of the users.
            names: of the lists, item_index among them.
        """
        return lists_of(self._take(rows, names))

    def read(self, rows: NDArray[np.int64]) -> pa.Table:
        """Return the histories of some users, of one at least, compared with their digests.

        Raises:
            DataError: one of them is another.
        """
        table = self._take(rows, [*self._files[0].names, DIGEST])
        if len(wrong := altered_rows(table)):
            raise altered(self._files[self._number(rows[wrong[0]])].path)
        return table.drop_columns(DIGEST)

    def _take(self, rows: NDArray[np.int64], names: Sequence[str]) -> pa.Table:
        tables, order = [], []
        for file, which, here in self._by_file(rows):
            tables.append(file.take(here, names))
            order.append(which)
        table, order = pa.concat_tables(tables), np.concatenate(order)
        return table if (np.diff(order) > 0).all() else table.take(np.argsort(order))

    def _by_file(self, rows: NDArray[np.int64]) -> Iterator[tuple[Rows, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each file that has any of the rows, which of them, and where it has them."""
        number = self._number(rows)
        for each in np.unique(number).tolist():
            which = np.flatnonzero(number == each)
            yield self._files[each], which, rows[which] - self._ends[each]

    def _number(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return in which file rows are."""
        return np.searchsorted(self._ends, rows, side="right") - 1
