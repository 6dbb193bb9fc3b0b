"""The newest events of each item, found without sorting and without holding more than a number an item."""

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 20


def capped_since(
    item_index: NDArray[np.int32], timestamp: NDArray[np.int64], num_rows: int, most: int
) -> NDArray[np.int64]:
    """Return the time from which each item's events are kept, `most` of them at most; int64 [num_rows] by item_index.

    Events of one time stay or go together: an item can keep fewer. Each time is found by halving.

    Args:
        item_index, timestamp: of all events, in any order; at least one.
        num_rows: one more than the largest item_index.
        most: events an item keeps.
    """
    since = np.full(num_rows, timestamp.min())
    until = np.full(num_rows, timestamp.max() + 1)
    capped = _count(item_index, timestamp, since) > most
    until[~capped] = since[~capped]
    while (open_ := until - since > 1).any():  # more than `most` lie at or after `since`, no more at or after `until`
        middle = np.where(open_, since + (until - since) // 2, until)
        fits = _count(item_index, timestamp, middle) <= most
        until = np.where(open_ & fits, middle, until)
        since = np.where(open_ & ~fits, middle, since)
    return until


def _count(item_index: NDArray[np.int32], timestamp: NDArray[np.int64], since: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count each item's events at or after its own time."""
    counts = np.zeros(len(since), dtype=np.int64)
    for first in range(0, len(item_index), BLOCK):
        item = item_index[first : first + BLOCK]
        counts += np.bincount(item[timestamp[first : first + BLOCK] >= since[item]], minlength=len(since))
    return counts
