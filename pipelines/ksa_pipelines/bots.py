"""Users that are hardly people: by rate, and by repetition."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAY = 86_400


@dataclass(frozen=True)
class BotRule:
    """When a user counts as a bot."""

    max_events_per_day: int = 5_000
    """More events than this on one UTC day."""
    min_events: int = 1_000
    """Repetition is looked at from this many events on."""
    max_item_share: float = 0.95
    """More than this share of the events on one item."""


def find_bots(
    item_index: NDArray[np.int32], timestamp: NDArray[np.int64], offsets: NDArray[np.int64], rule: BotRule
) -> NDArray[np.bool_]:
    """Return which users are bots: [T], [T], offsets [U + 1] -> bool [U].

    Args:
        item_index, timestamp: events in order; seconds.
        offsets: of the users' events.
        rule: the limits.
    """
    bots = np.zeros(len(offsets) - 1, dtype=bool)
    for user in np.flatnonzero(np.diff(offsets) > min(rule.max_events_per_day, rule.min_events - 1)):
        rows = slice(offsets[user], offsets[user + 1])
        length = offsets[user + 1] - offsets[user]
        busiest = np.unique(timestamp[rows] // DAY, return_counts=True)[1].max()
        commonest = np.unique(item_index[rows], return_counts=True)[1].max()
        repeats = length >= rule.min_events and commonest > rule.max_item_share * length
        bots[user] = busiest > rule.max_events_per_day or repeats
    return bots
