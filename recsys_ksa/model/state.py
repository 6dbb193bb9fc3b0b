"""User state: all that is kept of a history to go on without it, as an explicit value.

States share immutable segments: appending copies the small tail only, and the old state stays valid. K/V bytes of a
summary layer: 2 * H_kv * D * b * (m * floor(N / k) + N - k * max(0, c - W)) with c = (N - 1) // k the last event's
chunk: a chunk leaves the window when the next event arrives, not when it closes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.model.place import num_summaries
from recsys_ksa.model.seen import SeenItems
from recsys_ksa.order import OrderKey

SEGMENT_ROWS = 64
"""Rows of an immutable segment; a tail is shorter."""


@dataclass(frozen=True)
class SharedRows:
    """Rows [n, 2, H_kv, D] in segments that several states may share; nothing is ever written in place."""

    segments: tuple[Tensor, ...]
    tail: Tensor

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return sum(len(segment) for segment in self.segments) + len(self.tail)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held."""
        return sum(part.numel() * part.element_size() for part in (*self.segments, self.tail))

    @cached_property
    def arrays(self) -> list[NDArray[np.floating]]:
        """The parts as NumPy sees them, on a CPU: the same memory."""
        return [part.numpy() for part in self.parts()]

    def parts(self, skip: int = 0) -> list[Tensor]:
        """Return the tensors that hold the rows, in order, without the first `skip` rows."""
        parts = [*self.segments, self.tail]
        while skip and skip >= len(parts[0]) and len(parts) > 1:
            skip -= len(parts.pop(0))
        if skip:
            parts[0] = parts[0][skip:]
        return parts

    def whole(self) -> Tensor:
        """Return all rows in one tensor."""
        return torch.cat(self.parts()) if self.segments else self.tail

    def extend(self, rows: Tensor) -> "SharedRows":
        """Return these rows and `rows` behind them."""
        if not len(rows):
            return self
        joined = torch.cat((self.tail, rows))
        if len(joined) < SEGMENT_ROWS:
            return SharedRows(self.segments, joined)
        parts = list(joined.split(SEGMENT_ROWS))
        tail = parts.pop() if len(parts[-1]) < SEGMENT_ROWS else self.tail[:0]
        return SharedRows((*self.segments, *(part.clone() for part in parts)), tail.clone())

    def drop(self, count: int) -> "SharedRows":
        """Return the rows without the first `count`."""
        if not count:
            return self
        first, *others = self.parts(count)
        if not any(first is part for part in (*self.segments, self.tail)):
            first = first.clone()  # a view would keep what is dropped
        *segments, tail = first, *others
        return SharedRows(tuple(segments), tail)


@dataclass(frozen=True)
class LayerState:
    """Rows of one layer: events of the window (all events in a `full` layer) and visible summaries."""

    kind: LayerKind
    events: SharedRows
    summaries: SharedRows

    @property
    def nbytes(self) -> int:
        """K/V bytes."""
        return self.events.nbytes + self.summaries.nbytes


@dataclass(frozen=True)
class Memory:
    """The part of a user state that the network reads and writes.

    last_input: [E], the last event's input to the last block, so that asking never appends; zeros before any event.
    """

    num_events: int
    layers: tuple[LayerState, ...]
    last_input: Tensor

    @property
    def nbytes(self) -> int:
        """K/V bytes over all layers."""
        return sum(layer.nbytes for layer in self.layers)


class UserMemory(Protocol):
    """What a memory tells, wherever its rows are."""

    @property
    def num_events(self) -> int:
        """Events appended so far."""
        ...

    @property
    def layers(self) -> tuple[LayerState, ...]:
        """Rows of every layer."""
        ...

    @property
    def last_input(self) -> Tensor:
        """The last event's input to the last block, [E]."""
        ...

    @property
    def nbytes(self) -> int:
        """K/V bytes over all layers."""
        ...


@dataclass(frozen=True)
class UserState:
    """A user's state: the network's memory and what the library keeps beside it.

    last_key: order key of the last event; None before any.
    num_unknown: events whose item the vocabulary does not know.
    history_hash: rolling SHA-256 of the events, 32 bytes.
    fingerprint: the network this state belongs to (see `recsys_ksa.model.fingerprint`).
    session_place: of the last event in its session (`recsys_ksa.features.sessions`); 0 where sessions are off.
    """

    memory: UserMemory
    last_key: OrderKey | None
    seen: SeenItems
    num_unknown: int
    history_hash: bytes
    fingerprint: str
    session_place: int = 0

    @property
    def num_events(self) -> int:
        """Events appended so far."""
        return self.memory.num_events

    @property
    def last_timestamp(self) -> int | None:
        """Unix seconds of the last event; None before any."""
        return None if self.last_key is None else self.last_key[0]

    @property
    def nbytes(self) -> int:
        """K/V bytes over all layers."""
        return self.memory.nbytes

    @property
    def seen_nbytes(self) -> int:
        """Bytes of the own items: 24 a distinct item."""
        return self.seen.nbytes

    @property
    def fixed_nbytes(self) -> int:
        """Bytes that do not grow with the history: the last event's input, its key, counters, hashes."""
        tie = len(self.last_key[1]) if self.last_key else 0
        row = self.memory.last_input.numel() * self.memory.last_input.element_size()
        return row + 8 + tie + 16 + len(self.history_hash) + len(self.fingerprint)


def window_start(config: ModelConfig, kind: LayerKind, num_events: int) -> int:
    """Return the first event whose row a layer of `kind` keeps after `num_events` events."""
    if kind == "full" or num_events == 0:
        return 0
    return max(0, (num_events - 1) // config.chunk_size - config.window_chunks) * config.chunk_size


def first_visible_chunk(config: ModelConfig, num_events: int) -> int:
    """Return the first chunk whose summaries a summary layer keeps after `num_events` events."""
    if config.max_visible_chunks is None or num_events == 0:
        return 0
    return max(0, (num_events - 1) // config.chunk_size - config.window_chunks - config.max_visible_chunks)


def grown(
    config: ModelConfig, layer: LayerState, had: int, total: int, events: Tensor, new_summaries: Tensor | None = None
) -> LayerState:
    """Return a layer's state after a history has grown from `had` to `total` events.

    Args:
        events: rows of all events from the old window's first on.
        new_summaries: rows of the summaries of the chunks that closed; None if none did.
    """
    if layer.kind == "full":
        return LayerState("full", layer.events.extend(events[had:]), layer.summaries)
    gone = window_start(config, "summary", total) - window_start(config, "summary", had)
    # The window is a tensor of its own: a view would keep what left it, summaries and other users' rows alive.
    window = events[gone:].clone()
    closed = layer.summaries if new_summaries is None else layer.summaries.extend(new_summaries)
    unseen = first_visible_chunk(config, total) - first_visible_chunk(config, had)
    return LayerState("summary", SharedRows((), window), closed.drop(num_summaries(config) * unseen))


def kv_bytes(config: ModelConfig, num_events: int, bytes_per_value: int = 4) -> int:
    """Return the K/V bytes of a user state by the formula, over all layers.

    A layer holds 2 * H_kv * D * b bytes for each summary of a closed, visible chunk and each event of the window.
    """
    row = 2 * config.num_kv_heads * config.head_dim * bytes_per_value
    total = 0
    for kind in config.layer_kinds:
        total += row * (num_events - window_start(config, kind, num_events))
        if kind == "summary":
            closed = num_events // config.chunk_size - first_visible_chunk(config, num_events)
            total += row * num_summaries(config) * max(0, closed)
    return total


def full_kv_bytes(config: ModelConfig, num_events: int, bytes_per_value: int = 4) -> int:
    """Return what full attention would keep: 2 * H_kv * D * b for each event and layer."""
    return 2 * config.num_kv_heads * config.head_dim * bytes_per_value * num_events * len(config.layers)
