"""How often each item was met by day, and how popular it was at any time. Torch-free.

Popularity *as of* a time counts the whole days before it: events before the midnight (UTC) at or before that time.
So a question never sees an event of its own time or later, and all questions of one day share one row of counts.

Letters: D days, I item rows, K kinds of counts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys_ksa.data.jagged_arrays import Ints
from recsys_ksa.errors import DataError
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Histories

DAY = 86_400
WEEK = 7
"""Days of the window."""
KINDS = ("events", "first_events")
"""What is counted: all events of an item, and those by which a user met it for the first time."""


@dataclass(frozen=True)
class DayCounts:
    """Counts of each item on each day that has any, ordered by day, then item."""

    day: Ints
    """int64 [n], days since the clock's 0, UTC."""
    item_index: Ints
    """int64 [n]; never the unknown item."""
    counts: NDArray[np.int64]
    """[n, K], by `KINDS`."""
    last_time: int
    """Time of the last event counted; 0 where there is none."""

    @staticmethod
    def of_histories(histories: "Histories", end: Ints | None = None) -> "DayCounts":
        """Count events 0..end-1 of every history, int64 [U]; None: all of them."""
        lengths = histories.lengths
        kept = lengths if end is None else np.asarray(end, dtype=np.int64)
        position = np.arange(histories.num_events) - np.repeat(histories.offsets[:-1], lengths)
        item = np.asarray(histories.item_index, dtype=np.int64)
        rows = (position < np.repeat(kept, lengths)) & (item != UNKNOWN_ITEM)
        user = np.repeat(np.arange(histories.num_users), lengths)[rows]
        item, time = item[rows], np.asarray(histories.timestamp, dtype=np.int64)[rows]
        stride = int(item.max(initial=0)) + 1
        first = np.zeros(len(item), dtype=bool)
        first[np.unique(user * stride + item, return_index=True)[1]] = True  # histories are in order of time
        key, slot = np.unique(time // DAY * stride + item, return_inverse=True)
        counts = np.stack((np.bincount(slot, minlength=len(key)), np.bincount(slot[first], minlength=len(key))), axis=1)
        return DayCounts(key // stride, key % stride, counts, int(time.max(initial=0)))

    def renumbered(self, item_index: Ints) -> "DayCounts":
        """Return the counts under other item indices, int64 [I] by today's index; 0 drops an item."""
        to = item_index[self.item_index]
        kept = to != UNKNOWN_ITEM
        return DayCounts(self.day[kept], to[kept], self.counts[kept], self.last_time)

    def cumulative(self, num_items: int) -> tuple[int, NDArray[np.int32]]:
        """Return the first day d, and int32 [D + 1, I, K]: row r counts the days before d + r."""
        if not len(self.day):
            return 0, np.zeros((1, num_items, len(KINDS)), dtype=np.int32)
        first, days = int(self.day.min()), int(np.ptp(self.day)) + 1
        table = np.zeros((days + 1, num_items, len(KINDS)), dtype=np.int32)
        table[self.day - first + 1, self.item_index] = self.counts
        return first, np.cumsum(table, axis=0, out=table)

    def save(self, file: Path) -> None:
        """Write the counts as Parquet: day, item_index, and a column a kind."""
        columns = {"day": self.day.astype(np.int32), "item_index": self.item_index.astype(np.int32)}
        columns |= {name: self.counts[:, at].astype(np.int32) for at, name in enumerate(KINDS)}
        table = pa.table(columns)
        pq.write_table(table.replace_schema_metadata({"last_time": str(self.last_time)}), file)

    @staticmethod
    def load(file: Path) -> "DayCounts":
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, or it is damaged.
        """
        try:
            table = pq.read_table(file)
            last_time = int((table.schema.metadata or {})[b"last_time"])
            day, item, *counts = (table[name].to_numpy().astype(np.int64) for name in ("day", "item_index", *KINDS))
        except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
            raise DataError(f"{file}: expected counts of items by day, got: {error}. Copy the run again.") from error
        return DayCounts(day, item, np.stack(counts, axis=1), last_time)

    def check_time(self, time: int) -> None:
        """Refuse a time before which the window holds no event.

        Raises:
            DataError: with the times that can be asked about.
        """
        today = time // DAY
        if not np.any((self.day < today) & (self.day >= today - WEEK)):
            first, last = (int(self.day.min()), int(self.day.max())) if len(self.day) else (0, -WEEK)
            raise DataError(
                f"popularity as of {time}: expected events on the {WEEK} whole days before it, got none. Name a time "
                f"from {(first + 1) * DAY} to {(last + WEEK + 1) * DAY - 1} s, or give newer events by --data."
            )
