"""Index arithmetic on jagged numpy arrays: `values [T, ...]` with `offsets [U + 1]`. No Python loops."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def offsets_of(lengths: Ints) -> Ints:
    """Return offsets [U + 1] of lengths [U]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ragged_arange(starts: Ints, lengths: Ints) -> Ints:
    """Return starts[u], starts[u] + 1, ... (lengths[u] of them) for each u, one after the other. [U], [U] -> [T]."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


def rank_within(owner: Ints, *keys: NDArray[np.generic]) -> Ints:
    """Return each row's place among the rows of its owner when sorted by `keys`, the first key foremost.

    Args:
        owner: non-decreasing int64 [T].
        keys: arrays [T].
    """
    order = np.lexsort((*reversed(keys), owner))
    first_row = np.searchsorted(owner, owner, side="left")
    rank = np.empty(len(owner), dtype=np.int64)
    rank[order] = np.arange(len(owner))
    return rank - first_row
