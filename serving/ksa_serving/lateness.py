"""How far back a late event lies, without counting each time the events after it."""

from collections import OrderedDict
from collections.abc import Callable

import apsw

from ksa_serving.user_view import UserHead

STEPS = 16
"""Times remembered of a user."""
MAX_USERS = 1000
"""Whose times are remembered: the last who sent late events."""

Times = tuple[int, list[tuple[int, int]]]
"""How many events there were, and (timestamp, how many events are at it or later), the newest first."""


class Lateness:
    """Counts events after a moment, up to `horizon`, to within an eighth of it; exactly for a horizon below 32.

    To count up to 20,000 rows for each late event let one sender hold the log's writer. The times of some of the newest
    events are read in one go instead, and read again after a 16th of the horizon has changed: some 16 rows an event.
    Called inside the writer's transactions; `clear` after one that failed.
    """

    def __init__(self, connection: apsw.Connection, horizon: int):
        self._connection = connection
        self._horizon = horizon
        self._step = max(1, horizon // STEPS)
        self._times: OrderedDict[tuple[int, int], Times] = OrderedDict()

    def events_after(self, user_key: int, head: UserHead, timestamp: int, before_reading: Callable[[], None]) -> int:
        """Return about how many live events lie after `timestamp`; `horizon` + 1 where they are more than `horizon`.

        Args:
            before_reading: called where rows are read: what was not written yet has to be.
        """
        known = self._times.get((user_key, head.generation))
        if known is None or abs(head.num_events - known[0]) >= self._step:
            before_reading()
            known = head.num_events, self._read(user_key, head)
            self._times[user_key, head.generation] = known
            if len(self._times) > MAX_USERS:
                self._times.popitem(last=False)
        self._times.move_to_end((user_key, head.generation))
        return next((count for at, count in reversed(known[1]) if at > timestamp), 0)

    def clear(self) -> None:
        """Forget what was read."""
        self._times.clear()

    def _read(self, user_key: int, head: UserHead) -> list[tuple[int, int]]:
        found = self._connection.execute(
            "SELECT timestamp, n FROM (SELECT timestamp, row_number() OVER (ORDER BY timestamp DESC) n FROM events"
            " WHERE user_key = ?1 AND generation = ?2 AND live = 1 ORDER BY timestamp DESC LIMIT ?3)"
            " WHERE (?3 - n) % ?4 = 0",
            (user_key, head.generation, self._horizon + 1, self._step),
        )
        return list(found)
