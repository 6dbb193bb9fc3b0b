"""The time since the previous event, and up to the request, in buckets. Integers in, integers out."""

import numpy as np
from numpy.typing import NDArray

NO_GAP = 0
"""Bucket of a history's first event, and of a request without a time."""
NUM_GAP_BUCKETS = 42
"""`NO_GAP`, then one bucket for each power of two of seconds up to 2^40 (35,000 years)."""


def gap_bucket(gap: int) -> int:
    """Return the bucket of a gap in seconds: 1 + bit_length(gap + 1) - 1, the gap clamped at 0 from below.

    In integers: float32 log2 puts hundreds of gaps in the wrong bucket.
    """
    return min((max(int(gap), 0) + 1).bit_length(), NUM_GAP_BUCKETS - 1)


def gap_buckets(gap: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `gap_bucket` of each value. int64 [T] -> int64 [T]. Exact: a float64 holds 2^53.

    The bits of a number are told by its exponent, read off as it lies in memory; `np.frexp` takes longer.
    """
    number = np.clip(gap, 0, 2**50).astype(np.float64) + 1.0
    return np.minimum((number.view(np.int64) >> 52) - 1022, NUM_GAP_BUCKETS - 1)


def history_gap_buckets(timestamp: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bucket of the seconds since each event's previous one, `NO_GAP` for a user's first.

    Args:
        timestamp: Unix seconds, int64 [T], ordered within each user.
        offsets: int64 [U + 1] into `timestamp`.
    """
    gap = np.diff(timestamp, prepend=timestamp[:1])
    buckets = gap_buckets(gap)
    starts = offsets[:-1][np.diff(offsets) > 0]
    buckets[starts] = NO_GAP
    return buckets


def request_bucket(last_timestamp: int | None, request_time: int | None) -> int:
    """Return the bucket of a request time: seconds since the last event, clamped at 0; `NO_GAP` without one."""
    if request_time is None or last_timestamp is None:
        return NO_GAP
    return gap_bucket(request_time - last_timestamp)
