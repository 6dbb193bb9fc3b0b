"""The histories that a data set has, read from its caches: what an increment touches, and the rest to hash again.

Both caches can be rebuilt from the parts: `histories.arrow` is the loader's, `ties.arrow` holds what the loader does
not need (`recsys_ksa.data.cache`).
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from ksa_pipelines.histories import lists_of
from ksa_pipelines.rows import MappedTable
from recsys_ksa.data.parts import Source, sizes_of
from recsys_ksa.schema import histories_schema


@dataclass(frozen=True)
class Stored:
    """Histories of a data set, users by index. Opens its files where it is used: a task carries their names."""

    histories: Path
    """The loader's cache."""
    ties: Path
    """Lists of tie and, where there are ids, event_id; batches of users."""
    num_buckets: int

    def recognise(self, users: pl.DataFrame, bucket: int) -> pl.DataFrame:
        """Add user_index and row to a bucket's user_id; null where the data set does not know the user."""
        table = self._histories.table
        row = np.flatnonzero(table.column("user_index").to_numpy() % self.num_buckets == bucket)
        there = table.select(["user_id", "user_index"]).take(pa.array(row)).append_column("row", pa.array(row))
        self._histories.release()
        return users.join(pl.DataFrame(there), on="user_id", how="left", maintain_order="left")

    def last_times(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the time of the last event of some users."""
        lists = self._histories.table.column("timestamp").chunk(0)
        found = lists.values.to_numpy()[lists.offsets.to_numpy()[rows + 1] - 1]
        self._histories.release()
        return found

    def events(self, rows: NDArray[np.int64]) -> pl.DataFrame:
        """Return the events of some users, rows ascending: user (place in `rows`), item_index, timestamp and so on."""
        lists, offsets = lists_of(self.read(rows))
        user = np.repeat(np.arange(len(rows)), np.diff(offsets))
        return pl.DataFrame(pa.table({"user": pa.array(user)} | {name: lists[name] for name in lists if name != "tie"}))

    def read(self, rows: NDArray[np.int64]) -> pa.Table:
        """Return the histories of some users, rows ascending."""
        taken = self._histories.table.take(pa.array(rows))
        columns = {name: taken.column(name) for name in taken.schema.names}
        ends = np.cumsum([0, *(len(chunk) for chunk in self._ties.table.column("tie").chunks)])
        cuts = np.searchsorted(rows, ends)
        for name in self._ties.table.schema.names:
            pieces = [
                chunk.take(pa.array(rows[first:last] - begin))
                for chunk, begin, first, last in zip(self._ties.table.column(name).chunks, ends, cuts, cuts[1:])
                if last > first
            ]
            columns[name] = pa.chunked_array(pieces, self._ties.table.schema.field(name).type)
        self._histories.release()
        self._ties.release()
        return pa.table({name: columns[name] for name in _in_schema_order(columns)})

    def numbered_users(self) -> tuple[int, ...]:
        """Return by bucket one more than the largest n of its users (`user_index = bucket + num_buckets * n`)."""
        numbered = np.zeros(self.num_buckets, dtype=np.int64)
        users = self._histories.table.column("user_index").to_numpy()
        np.maximum.at(numbered, users % self.num_buckets, users // self.num_buckets + 1)
        return tuple(numbered.tolist())

    def others(self, touched: Sequence[Source]) -> "Others":
        """Return the users that are in none of some sources, as a source of `parts.blocks`."""
        users = [source.users for source in touched]
        return Others(self._histories, self._ties, np.concatenate([np.empty(0, np.int64), *users]))

    @cached_property
    def _histories(self) -> MappedTable:
        return MappedTable(self.histories)

    @cached_property
    def _ties(self) -> MappedTable:
        return MappedTable(self.ties)


class Others:
    """Rows that stay as they are: a source of `parts.blocks`."""

    def __init__(self, histories: MappedTable, ties: MappedTable, touched: NDArray[np.int64]) -> None:
        self._histories, self._ties = histories, ties
        columns = {field.name: field for mapped in (histories, ties) for field in mapped.table.schema}
        self.schema = pa.schema([columns[name] for name in _in_schema_order(columns)])
        self.users = histories.table.column("user_index").to_numpy()
        self.newest = ~np.isin(self.users, touched)
        self.num_events = len(histories.table.column("item_index").chunk(0).values)
        self._row = 0

    def sizes(self) -> tuple[int, int]:
        """Return the events and the bytes of user ids of the newest rows."""
        return sizes_of(self._histories.table, self.newest)

    def before(self, user_index: int) -> pa.Table | None:
        """Return the next untouched rows up to, without, `user_index`, or None."""
        first, self._row = self._row, int(np.searchsorted(self.users, user_index))
        newest = self.newest[first : self._row]
        if not newest.any():
            return None
        tables = [mapped.table.slice(first, self._row - first) for mapped in (self._histories, self._ties)]
        columns = {name: table.column(name) for table in tables for name in table.schema.names}
        rows = pa.Table.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)
        rows = rows.take(pa.array(np.flatnonzero(newest))).combine_chunks()
        self._histories.release()
        self._ties.release()
        return rows


def _in_schema_order(names: Container[str]) -> list[str]:
    schema = histories_schema(has_event_type=True, has_event_id=True, has_value=True)
    return [name for name in schema.names if name in names]
