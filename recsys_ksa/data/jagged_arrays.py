"""Index arithmetic on jagged numpy arrays: `values [T, ...]` with `offsets [U + 1]`. No Python loops."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lists:
    """Rows of a table, jagged: those of owner n are index[offsets[n]:offsets[n + 1]].

    offsets: int64 [N + 1].
    index: int32.
    """

    offsets: Ints
    index: NDArray[np.int32]


def offsets_of(lengths: Ints) -> Ints:
    """Return offsets [U + 1] of lengths [U]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ragged_arange(starts: Ints, lengths: Ints) -> Ints:
    """Return starts[u], starts[u] + 1, ... (lengths[u] of them) for each u, one after the other. [U], [U] -> [T]."""
    offsets = offsets_of(lengths)
    numbers = np.repeat(starts - offsets[:-1], lengths)
    numbers += np.arange(offsets[-1])
    return numbers


def run_offsets(values: Ints) -> Ints:
    """Return offsets [R + 1] of the runs of equal neighbours. [T] -> [R + 1]."""
    begins = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return np.append(np.flatnonzero(begins), len(values))


def lowest_within(owner: Ints, key: Ints | NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Return which rows are among their owner's `count` lowest by `key`, whose values all differ. [T] -> [T].

    A loop over the owners that have more than `count` rows: selecting is several times faster than sorting all rows.
    """
    kept = np.ones(len(owner), dtype=bool)
    offsets = run_offsets(owner)
    many = np.flatnonzero(np.diff(offsets) > count)
    for begin, end in zip(offsets[many].tolist(), offsets[many + 1].tolist()):
        own = key[begin:end]
        kept[begin:end] = own < np.partition(own, count)[count]
    return kept
