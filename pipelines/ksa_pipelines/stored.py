"""The histories that a data set has, where an increment touches them: rows taken from `recsys_ksa.data.rows`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.histories import lists_of
from recsys_ksa.data.parts import mark_newest
from recsys_ksa.data.rows import DIGEST, Rows, check_digests, rows_name

UNKNOWN = -1
"""user_index and row of a user whom the data set does not know."""


@dataclass(frozen=True)
class Stored:
    """Histories of a data set. Opens its files where it is used: a task carries their names."""

    directory: Path
    parts: Mapping[int, Sequence[str]]
    """Of each bucket, oldest first; their rows are there (`rows.open_rows`)."""

    def bucket(self, bucket: int) -> "StoredBucket":
        """Return the histories of a bucket's users."""
        return StoredBucket([Rows(self.directory / rows_name(part)) for part in self.parts.get(bucket, ())])


class StoredBucket:
    """The newest rows of a bucket's files, counted by user_index."""

    def __init__(self, files: Sequence[Rows]) -> None:
        mark_newest(files)
        self._files = files
        rows = [np.flatnonzero(file.newest) for file in files]
        users = np.concatenate([np.empty(0, np.int64), *(file.users[file.newest] for file in files)])
        order = np.argsort(users)
        self._row = np.concatenate([np.empty(0, np.int64), *rows])[order]
        """Of each history in its file."""
        self._file = np.repeat(np.arange(len(files)), [len(each) for each in rows])[order]

    def recognise(self, user_ids: pl.Series) -> pl.DataFrame:
        """Return user_id, user_index and row of some users; -1 twice where the data set does not know the user."""
        known = self._take(np.arange(len(self._row)), ["user_id", "user_index"])
        options = pc.SetLookupOptions(known.column("user_id").cast(pa.large_string()))
        row = pc.call_function("index_in", [to_arrow(user_ids)], options).fill_null(-1).to_numpy().astype(np.int64)
        user_index = np.append(known.column("user_index").to_numpy(), UNKNOWN)[row]
        return pl.DataFrame({"user_id": user_ids, "user_index": user_index, "row": row})

    def last_times(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the time of the last event of some users."""
        found = np.empty(len(rows), dtype=np.int64)
        for number, file in enumerate(self._files):
            here = self._file[rows] == number
            last = file.offsets[self._row[rows[here]] + 1] - 1
            found[here] = file.column("timestamp").values.to_numpy()[last]
            file.release()
        return found

    def events(self, rows: NDArray[np.int64], names: Sequence[str]) -> tuple[dict[str, pa.Array], NDArray[np.int64]]:
        """Return some lists of some users, rows ascending, and their offsets; compared with nothing: `read` does that.

        Args:
            rows: of the users.
            names: of the lists, item_index among them.
        """
        return lists_of(self._take(rows, ["user_index", *names]))

    def read(self, rows: NDArray[np.int64]) -> pa.Table:
        """Return the histories of some users, rows ascending, compared with their digests.

        Raises:
            DataError: one of them is another.
        """
        return self._take(rows, [*self._files[0].names, DIGEST]).drop_columns(DIGEST)

    def _take(self, rows: NDArray[np.int64], names: Sequence[str]) -> pa.Table:
        """Return columns of some rows, ascending."""
        tables = []
        for number, file in enumerate(self._files):
            here = self._row[rows[self._file[rows] == number]]
            if len(here):
                tables.append(file.take(here, names))
                if DIGEST in names:
                    check_digests(tables[-1], file.path)
        if not tables:
            return pa.table({"user_id": pa.array([], pa.string()), "user_index": pa.array([], pa.int64())})
        table = pa.concat_tables(tables)
        return table if len(tables) == 1 else table.sort_by("user_index").combine_chunks()
