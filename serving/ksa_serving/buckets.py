"""Token buckets: how much each of many may have of something, in bounded memory."""

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
MOST_OWED_SECONDS = 600.0
"""A bucket never owes more than fills in so long."""


class Buckets(Generic[Key]):
    """A bucket for each key: full at first, it fills at `per_second` up to `most`. Safe to share between threads.

    Of more than `keys` keys the one untouched longest is forgotten, as if it were full: it is the likeliest to be.
    """

    def __init__(self, per_second: float, most: float, keys: int = 10_000):
        self._rate = per_second
        self._most = most
        self._keys = keys
        self._levels: OrderedDict[Key, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: Key, amount: float = 1.0) -> float:
        """Take `amount` and return 0; where too little is there take nothing and return the seconds until it will be.

        More than a bucket holds is taken from a full one, which owes the rest.
        """
        with self._lock:
            now = time.monotonic()
            level = self._level(key, now)
            missing = min(amount, self._most) - level
            if missing <= 0:
                self._set(key, level - amount, now)
        return max(0.0, missing / self._rate)

    def owe(self, key: Key, amount: float) -> None:
        """Take `amount` although it may not be there."""
        with self._lock:
            now = time.monotonic()
            self._set(key, self._level(key, now) - amount, now)

    def wait(self, key: Key, amount: float = 0.0) -> float:
        """Return the seconds until `amount` is there; for 0, until nothing is owed."""
        with self._lock:
            missing = min(amount, self._most) - self._level(key, time.monotonic())
        return max(0.0, missing / self._rate)

    def __len__(self) -> int:
        """Return how many keys are remembered."""
        return len(self._levels)

    def _level(self, key: Key, now: float) -> float:
        level, since = self._levels.get(key, (self._most, now))
        return min(self._most, level + (now - since) * self._rate)

    def _set(self, key: Key, level: float, now: float) -> None:
        self._levels[key] = (max(level, -MOST_OWED_SECONDS * self._rate), now)
        self._levels.move_to_end(key)
        if len(self._levels) > self._keys:
            self._levels.popitem(last=False)
