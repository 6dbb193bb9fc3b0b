"""One lock a user, so that a user's state is changed by one call at a time."""

import asyncio
from weakref import WeakValueDictionary

from ksa_serving.events import Owner


class UserLocks:
    """Locks that live as long as someone holds or awaits them. Used on one event loop."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[Owner, asyncio.Lock] = WeakValueDictionary()

    def of(self, owner: Owner) -> asyncio.Lock:
        """Return the user's lock."""
        lock = self._locks.get(owner)
        if lock is None:
            lock = self._locks[owner] = asyncio.Lock()
        return lock
