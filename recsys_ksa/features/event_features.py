"""Which features of an event are on beside item, type and gap, and the one way to compute them.

Training computes them of many users' spans at once, appending of the few events that arrive; both call `columns`, so
that online tokens equal batch tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.features.calendar import ROWS, CalendarFeature, calendar_rows
from recsys_ksa.features.sessions import LONGEST, NO_PLACE, NUM_SESSION_BUCKETS, session_buckets, session_places
from recsys_ksa.features.values import value_buckets

if TYPE_CHECKING:
    from recsys_ksa.config import ModelConfig

Columns = dict[str, NDArray[np.int64]]
"""Name of a feature -> its table's row for each event, int64 [T]."""


@dataclass(frozen=True)
class EventFeatures:
    """The features that are on; nothing by default.

    calendar: of an event's own time.
    session_gap: seconds; a longer pause begins a session; None: no sessions.
    value_edges: ascending; none: no values.
    """

    calendar: tuple[CalendarFeature, ...] = ()
    session_gap: int | None = None
    value_edges: tuple[float, ...] = ()

    @staticmethod
    def of(config: "ModelConfig") -> "EventFeatures":
        """Return the features that a network's config turns on."""
        return EventFeatures(config.calendar, config.session_gap, config.value_edges)

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each feature's table, by name."""
        rows: dict[str, int] = {name: ROWS[name] for name in self.calendar}
        if self.session_gap is not None:
            rows["session"] = NUM_SESSION_BUCKETS
        if self.value_edges:
            rows["value"] = 2 + len(self.value_edges)
        return rows

    @property
    def events_before(self) -> int:
        """Events that must be known before a place in a history to go on from there."""
        return 0 if self.session_gap is None else LONGEST - 1

    def columns(
        self,
        timestamp: NDArray[np.int64],
        value: NDArray[np.float64] | None,
        offsets: NDArray[np.int64],
        last_timestamp: NDArray[np.int64],
        last_place: NDArray[np.int64],
    ) -> tuple[Columns, NDArray[np.int64]]:
        """Return each event's features, and each user's place in its session after the last event, int64 [U].

        Args:
            timestamp: Unix seconds, int64 [T], ordered within each user.
            value: float64 [T], NaN where an event has none; None: no event has one. Not looked at without edges.
            offsets: int64 [U + 1] into the events.
            last_timestamp, last_place: of the event before each user's first given one, int64 [U]; where there is
                none, the place is `NO_PLACE`.
        """
        found: Columns = {name: calendar_rows(name, timestamp) for name in self.calendar}
        after = last_place
        if self.session_gap is not None:
            place = session_places(timestamp, offsets, self.session_gap, last_timestamp, last_place)
            found["session"] = session_buckets(place)
            given = np.diff(offsets) > 0
            after = last_place.copy()
            after[given] = place[offsets[1:][given] - 1]
        if self.value_edges:
            value = np.full(len(timestamp), np.nan) if value is None else value
            found["value"] = value_buckets(value, self.value_edges)
        return found, after

    def arrivals(
        self,
        timestamp: NDArray[np.int64],
        value: Sequence[float | None] | None,
        offsets: NDArray[np.int64],
        last_timestamp: Sequence[int | None],
        session_place: Sequence[int],
    ) -> tuple[Columns, NDArray[np.int64]]:
        """Return `columns` of some users' next events, and the places in their sessions after them, int64 [U].

        Args:
            timestamp: Unix seconds, int64 [n], ordered within each user.
            value: n of them, rounded to float32 as a data set keeps them; None: no event has one.
            offsets: int64 [U + 1] into the events.
            last_timestamp: of the event before each user's first; None at a history's start.
            session_place: of that event; `NO_PLACE` at a history's start.
        """
        if not self.num_rows:
            return {}, np.full(len(session_place), NO_PLACE, np.int64)
        last = np.array([time or 0 for time in last_timestamp], dtype=np.int64)
        worth: Any = None
        if value is not None:
            given = np.array([np.nan if each is None else each for each in value], dtype=np.float64)
            with np.errstate(over="ignore"):
                worth = given.astype(np.float32).astype(np.float64)
        return self.columns(timestamp, worth, offsets, last, np.array(session_place, dtype=np.int64))
