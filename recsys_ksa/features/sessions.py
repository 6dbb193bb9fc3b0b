"""Sessions: runs of events without a long pause. How far into its session an event lies, in buckets.

A place is counted up to `LONGEST` only. So one small number carries it from event to event, and whoever starts in the
middle of a history needs the `LONGEST - 1` events before and no more.
"""

import numpy as np
from numpy.typing import NDArray

LONGEST = 16
"""Places from here on are alike."""
NO_PLACE = 0
"""Place of the event before a history's first."""
_BUCKETS = np.array([place.bit_length() for place in range(LONGEST + 1)], dtype=np.int64)
NUM_SESSION_BUCKETS = int(_BUCKETS[-1]) + 1
"""`NO_PLACE`, then one bucket for each power of two of places: 1, 2-3, 4-7, 8-15, 16 and more."""


def session_places(
    timestamp: NDArray[np.int64],
    offsets: NDArray[np.int64],
    session_gap: int,
    last_timestamp: NDArray[np.int64],
    last_place: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return each event's place in its session, 1 to `LONGEST`; int64 [T].

    Args:
        timestamp: Unix seconds, int64 [T], ordered within each user.
        offsets: int64 [U + 1] into `timestamp`.
        session_gap: a longer pause, in seconds, begins a session.
        last_timestamp, last_place: of the event before each user's first given one, int64 [U]; where there is none,
            the place is `NO_PLACE`.
    """
    begins = np.diff(timestamp, prepend=timestamp[:1]) > session_gap
    given = np.diff(offsets) > 0
    first = offsets[:-1][given]
    goes_on = (last_place[given] != NO_PLACE) & (timestamp[first] - last_timestamp[given] <= session_gap)
    begins[first] = True
    run = np.flatnonzero(begins)
    base = np.ones(len(run), dtype=np.int64)
    base[np.searchsorted(run, first[goes_on])] += last_place[given][goes_on]
    size = np.diff(run, append=len(timestamp))
    return np.minimum(np.repeat(base - run, size) + np.arange(len(timestamp)), LONGEST)


def session_buckets(place: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bucket of each place: its bit length. int64 [T] -> int64 [T]."""
    return _BUCKETS[place]
