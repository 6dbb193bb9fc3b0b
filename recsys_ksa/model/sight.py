"""What one query sees, and the rows of it that a user's layer holds. The visibility rule, query by query."""

from typing import NamedTuple, Self

import numpy as np

from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.model.array_block import Array
from recsys_ksa.model.place import num_summaries
from recsys_ksa.model.state import LayerState, first_visible_chunk, window_start


class Sight(NamedTuple):
    """A range of a history's events and one of its summaries: each from the first up to, not with, the second."""

    events: tuple[int, int]
    summaries: tuple[int, int]


def event_sight(config: ModelConfig, kind: LayerKind, event: int) -> Sight:
    """Return what an event sees in a layer of `kind`: its window and itself, and the summaries of older chunks."""
    if kind == "full":
        return Sight((0, event + 1), (0, 0))
    old = max(0, event // config.chunk_size - config.window_chunks)
    oldest = 0 if config.max_visible_chunks is None else max(0, old - config.max_visible_chunks)
    m = num_summaries(config)
    return Sight((old * config.chunk_size, event + 1), (oldest * m, old * m))


def summary_sight(config: ModelConfig, chunk: int, slot: int) -> Sight:
    """Return what a summary sees: the events of its chunk, and the chunk's summaries up to itself."""
    first = chunk * num_summaries(config)
    return Sight((chunk * config.chunk_size, (chunk + 1) * config.chunk_size), (first, first + slot + 1))


class HeldRows(NamedTuple):
    """A user's rows in one layer, in one array [E + S, 2, J, D]: events from `first_event` on, then summaries."""

    rows: Array
    num_events: int
    first_event: int
    first_summary: int

    @classmethod
    def of(cls, config: ModelConfig, layer: LayerState, num_events: int, *new: Array) -> Self:
        """Join what a layer holds of a history of `num_events` events with new events' and new summaries' rows."""
        first_event = window_start(config, layer.kind, num_events)
        new_events, new_summaries = new[:1], new[1:]
        rows = np.concatenate((*layer.events.arrays, *new_events, *layer.summaries.arrays, *new_summaries))
        held = num_events - first_event + sum(map(len, new_events))
        return cls(rows, held, first_event, num_summaries(config) * first_visible_chunk(config, num_events))

    @property
    def events(self) -> Array:
        """The events' rows."""
        return self.rows[: self.num_events]

    def seen(self, sight: Sight) -> Array:
        """Return the rows that a query sees, in one array."""
        first, stop = (at - self.first_event for at in sight.events)
        old, old_stop = (at - self.first_summary + self.num_events for at in sight.summaries)
        if old == old_stop:
            return self.rows[first:stop]
        if old == stop:  # one behind the other
            return self.rows[first:old_stop]
        return np.concatenate((self.rows[first:stop], self.rows[old:old_stop]))
