"""Where an event lies in the day and in the week, in UTC, by integer arithmetic on Unix seconds.

Of a clock that is `relative`, days and weeks count from the data set's own start.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

CalendarFeature = Literal["hour", "weekday"]
NOT_SHOWN = 0
"""Row of a request without a time."""
ROWS: dict[CalendarFeature, int] = {"hour": 1 + 24, "weekday": 1 + 7}
"""Rows of each feature's table: `NOT_SHOWN`, then its values."""
_HOUR, _DAY = 3_600, 86_400
_EPOCH_WEEKDAY = 3
"""1970-01-01 was a Thursday; Monday is 0."""


def calendar_rows(feature: CalendarFeature, timestamp: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 1 + the hour of the day (0 to 23), or 1 + the day of the week (Monday 0). int64 [T] -> int64 [T]."""
    if feature == "hour":
        return 1 + timestamp // _HOUR % 24
    return 1 + (timestamp // _DAY + _EPOCH_WEEKDAY) % 7
