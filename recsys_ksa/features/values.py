"""What an event was worth (a rating, a price, seconds watched), in buckets between given edges."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NO_VALUE = 0
"""Bucket of an event without a value."""


def value_buckets(value: NDArray[np.float64], edges: Sequence[float]) -> NDArray[np.int64]:
    """Return 1 + how many edges lie at or below each value, `NO_VALUE` where it is NaN. float64 [T] -> int64 [T].

    Args:
        value: NaN where an event has none.
        edges: ascending; 1 + len(edges) buckets, after `NO_VALUE`.
    """
    above = 1 + np.searchsorted(np.asarray(edges, dtype=np.float64), value, side="right")
    return np.where(np.isnan(value), NO_VALUE, above)
