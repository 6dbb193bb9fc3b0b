"""The items a user already had, each with (count, first time, last time): 24 bytes an item. Torch-free, immutable."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BYTES_PER_ITEM = 24


@dataclass(frozen=True)
class SeenItems:
    """Arrays of one length, sorted by item index. The unknown item is not among them.

    item_index: int32 [O]; count: int32 [O], meetings; first, last: int64 [O], timestamps.
    """

    item_index: NDArray[np.int32]
    count: NDArray[np.int32]
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    @staticmethod
    def empty() -> "SeenItems":
        """Return the items of a user without events."""
        return SeenItems(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))

    @staticmethod
    def from_events(item_index: NDArray[np.integer], timestamp: NDArray[np.int64]) -> "SeenItems":
        """Count events, given in order. [T], [T]."""
        known = item_index > 0
        items, inverse, count = np.unique(item_index[known], return_inverse=True, return_counts=True)
        times = timestamp[known]
        first = np.full(len(items), np.iinfo(np.int64).max)
        last = np.full(len(items), np.iinfo(np.int64).min)
        np.minimum.at(first, inverse, times)
        np.maximum.at(last, inverse, times)
        return SeenItems(items.astype(np.int32), count.astype(np.int32), first, last)

    def add(self, item_index: NDArray[np.integer], timestamp: NDArray[np.int64]) -> "SeenItems":
        """Return the items after further events. [n], [n]; this value stays as it is."""
        new = SeenItems.from_events(item_index, timestamp)
        if not len(self):
            return new
        at = np.searchsorted(self.item_index, new.item_index)
        known = (at < len(self)) & (self.item_index[np.minimum(at, len(self) - 1)] == new.item_index)
        count, first, last = self.count.copy(), self.first.copy(), self.last.copy()
        count[at[known]] += new.count[known]
        first[at[known]] = np.minimum(first[at[known]], new.first[known])
        last[at[known]] = np.maximum(last[at[known]], new.last[known])
        fresh = ~known
        return SeenItems(
            np.insert(self.item_index, at[fresh], new.item_index[fresh]),
            np.insert(count, at[fresh], new.count[fresh]),
            np.insert(first, at[fresh], new.first[fresh]),
            np.insert(last, at[fresh], new.last[fresh]),
        )

    def __len__(self) -> int:
        """Return the number of distinct items."""
        return len(self.item_index)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays: 24 a distinct item."""
        return BYTES_PER_ITEM * len(self)
