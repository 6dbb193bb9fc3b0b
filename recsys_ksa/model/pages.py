"""Memories in pages: the rows of many users in one pool, which `summary_append` reads and extends in place.

For an accelerator, where a tensor a user and layer would cost a launch each. A memory in pages is a value as `Memory`
is: it never changes, and stays valid after an append. So memories share pages. A page is written once, behind the rows
that any memory sees of it; who appends to a memory that was appended to before gets a copy of its last page.

Token t of a kind (events by index, summaries by chunk and slot) is row t % PAGE_ROWS of page t // PAGE_ROWS of its run;
all layers share one numbering. All work on a pool runs on one stream of its device, in order: a page that nobody holds
any more may be dealt out again while a pass that reads it is still to run.
"""

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksa_kernels.summary_append import Pages
from recsys_ksa.config import ModelConfig
from recsys_ksa.errors import ConfigError, PoolFullError, StateError
from recsys_ksa.model.place import num_summaries
from recsys_ksa.model.state import LayerState, SharedRows, UserMemory, first_visible_chunk, window_start

PAGE_ROWS = 16
"""Tokens of a page: half a page a run is wasted at the mean, and a table has an entry a page."""

Span = tuple["Run", int, int]
"""A run of tokens, and the first and the number behind the last token it is to have room for."""


@dataclass(frozen=True, eq=False)
class Run:
    """Where pages `first`, `first + 1`, ... of one kind of one history's tokens are; held as long as it is."""

    first: int
    places: NDArray[np.int64]

    @property
    def stop(self) -> int:
        """The number behind that of the last page."""
        return self.first + len(self.places)

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return where tokens start..stop-1 are, counted in rows of the pool."""
        token = np.arange(start, stop)
        return self.places[token // PAGE_ROWS - self.first] * PAGE_ROWS + token % PAGE_ROWS


class Dealer:
    """Deals out numbered places to runs and takes back those that no run holds. Its user holds a lock."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._runs = np.zeros(count, np.int32)
        self._given_back: deque[NDArray[np.int64]] = deque()

    @property
    def num_free(self) -> int:
        """Places that could be taken."""
        while self._given_back:
            places = self._given_back.popleft()
            self._runs[places] -= 1
            self._free.extend(places[self._runs[places] == 0].tolist())
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return so many places; `num_free` has told that there are."""
        return [self._free.pop() for _ in range(count)]

    def run(self, first: int, places: NDArray[np.int64]) -> Run:
        """Return a run of places, some of which other runs may hold, too."""
        self._runs[places] += 1
        run = Run(first, places)
        # Called wherever Python collects the run, so it takes no lock.
        weakref.finalize(run, self._given_back.append, places).atexit = False
        return run


@dataclass(frozen=True, eq=False)
class PagedMemory:
    """A `UserMemory` in a pool's pages."""

    num_events: int
    pool: "PagePool"
    events: Run
    summaries: Run
    input: Run
    """One place: of the last event's input to the last block; none before any event."""

    @property
    def layers(self) -> tuple[LayerState, ...]:
        """The rows, copied out of the pages."""
        return self.pool.layers(self)

    @property
    def last_input(self) -> Tensor:
        """[E]; zeros before any event."""
        if not self.num_events:
            return self.pool.inputs.new_zeros(self.pool.inputs.shape[1])
        return self.pool.last_inputs([self])[0]

    @property
    def nbytes(self) -> int:
        """K/V bytes over all layers: of whole pages."""
        return (len(self.events.places) + len(self.summaries.places)) * self.pool.page_bytes


@dataclass(frozen=True)
class Growth:
    """How a memory's pages are extended for new events.

    events, summaries: all that the new tokens may see, and they themselves.
    memory: what is held afterwards.
    """

    events: Run
    summaries: Run
    memory: PagedMemory


class PagePool:
    """Pages on one device for memories of one network. Safe to share between threads.

    key, value: [L, pages, PAGE_ROWS, H_kv, D]; inputs: [pages, E].
    """

    def __init__(
        self, config: ModelConfig, num_bytes: int, dtype: torch.dtype, input_dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take the device's memory, and hand it out.

        Args:
            num_bytes: of keys and values.
            dtype: of rows; `input_dtype` of the last block's inputs.

        Raises:
            ConfigError: the network has layers that keep every event, or not one page fits.
        """
        if set(config.layer_kinds) != {"summary"}:
            raise ConfigError(
                f"pages: expected summary layers alone, got layers {list(config.layer_kinds)}. "
                "Serve this network without pages."
            )
        self.config = config
        shape = (PAGE_ROWS, config.num_kv_heads, config.head_dim)
        self.page_bytes = 2 * len(config.layer_kinds) * PAGE_ROWS * shape[1] * shape[2] * dtype.itemsize
        count = num_bytes // self.page_bytes
        if not count:
            raise ConfigError(f"pages: expected room for a page of {self.page_bytes} bytes, got {num_bytes}.")
        self.key, self.value = (
            torch.zeros(len(config.layer_kinds), count, *shape, dtype=dtype, device=device) for _ in range(2)
        )
        self.inputs = torch.zeros(count, config.dim, dtype=input_dtype, device=device)
        self._pages, self._slots = Dealer(count), Dealer(count)
        self._filled = np.zeros(count, np.int64)
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        with self._lock:
            return self._pages.num_free

    @cached_property
    def empty(self) -> PagedMemory:
        """The memory of a user without events."""
        nothing = Run(0, np.zeros(0, np.int64))
        return PagedMemory(0, self, nothing, nothing, nothing)

    def hold(self, memory: UserMemory) -> PagedMemory:
        """Return a memory in pages; another one's rows are copied in.

        Raises:
            PoolFullError: there is no room.
            StateError: it lacks rows (a cold one does).
        """
        if isinstance(memory, PagedMemory) and memory.pool is self:
            return memory
        total = memory.num_events
        if not total:
            return self.empty
        event_start, slot_start = self._starts(total)
        span = (self.empty.events, event_start, total), (self.empty.summaries, slot_start, self._num_slots(total))
        held = self._deal([span], [total])[0].memory
        (_, *events), (_, *slots) = span
        event_rows = torch.from_numpy(held.events.rows(*events)).to(self.key.device)
        slot_rows = torch.from_numpy(held.summaries.rows(*slots)).to(self.key.device)
        for depth, layer in enumerate(memory.layers):
            if (layer.events.num_rows, layer.summaries.num_rows) != (len(event_rows), len(slot_rows)):
                raise StateError(
                    f"pages: expected {len(event_rows)} events' and {len(slot_rows)} summaries' rows in layer {depth}, "
                    f"got {layer.events.num_rows} and {layer.summaries.num_rows}. Replay a cold state first."
                )
            self.write(depth, event_rows, layer.events.whole())
            self.write(depth, slot_rows, layer.summaries.whole())
        self.put_last_inputs([held], memory.last_input[None])
        return held

    def grow(self, memories: Sequence[PagedMemory], totals: Sequence[int]) -> list[Growth]:
        """Return room for each user's events up to `totals`, more than there were, and the summaries they close.

        Raises:
            PoolFullError: there is not enough; nothing has changed then.
        """
        return self._deal(
            [
                (
                    (memory.events, memory.num_events, total),
                    (memory.summaries, self._num_slots(memory.num_events), self._num_slots(total)),
                )
                for memory, total in zip(memories, totals, strict=True)
            ],
            totals,
        )

    def write(self, depth: int, where: Tensor, rows: Tensor) -> None:
        """Write rows [n, 2, H_kv, D] of a layer at `where`, int64 [n] in rows of the pool."""
        for pool, part in zip((self.key, self.value), rows.unbind(1)):
            pool[depth].flatten(0, 1).index_copy_(0, where, part.to(pool.dtype))

    def pages(self, depth: int, table: Tensor) -> Pages:
        """Return a layer's pool as users see it whose pages `table` tells, int32 [U, ring]."""
        return Pages(self.key[depth], self.value[depth], table)

    def last_inputs(self, memories: Sequence[PagedMemory]) -> Tensor:
        """Return the last block's input of each one's last event, [U, E]; each has events."""
        places = np.concatenate([memory.input.places for memory in memories])
        return self.inputs[torch.from_numpy(places).to(self.inputs.device)]

    def put_last_inputs(self, memories: Sequence[PagedMemory], inputs: Tensor) -> None:
        """Keep the last block's input of each one's last event, [U, E], in a place that nobody reads yet."""
        places = np.concatenate([memory.input.places for memory in memories])
        self.inputs.index_copy_(0, torch.from_numpy(places).to(inputs.device), inputs.to(self.inputs.dtype))

    def layers(self, memory: PagedMemory) -> tuple[LayerState, ...]:
        """Return a memory's rows, copied out; segments of summaries as `SharedRows` cuts them."""
        total = memory.num_events
        event_start, slot_start = self._starts(total)
        device = self.key.device
        events = torch.from_numpy(memory.events.rows(event_start, total)).to(device)
        slots = torch.from_numpy(memory.summaries.rows(slot_start, self._num_slots(total))).to(device)

        def rows(depth: int, where: Tensor) -> Tensor:
            return torch.stack([pool[depth].flatten(0, 1)[where] for pool in (self.key, self.value)], dim=1)

        nothing = SharedRows((), rows(0, events[:0]))
        return tuple(
            LayerState("summary", SharedRows((), rows(depth, events)), nothing.extend(rows(depth, slots)))
            for depth in range(len(self.key))
        )

    def _starts(self, num_events: int) -> tuple[int, int]:
        """Return the first event and the first summary whose rows are kept after so many events."""
        m = num_summaries(self.config)
        return window_start(self.config, "summary", num_events), m * first_visible_chunk(self.config, num_events)

    def _num_slots(self, num_events: int) -> int:
        return num_summaries(self.config) * (num_events // self.config.chunk_size)

    def _deal(self, spans: Sequence[tuple[Span, Span]], totals: Sequence[int]) -> list[Growth]:
        """Return room for each user's spans of events and summaries, of histories that are `totals` long then."""
        needed = sum(_most_new(had, total) for both in spans for _, had, total in both)
        copies: list[tuple[int, int]] = []
        with self._lock:
            free = self._pages.num_free
            if needed > free or len(spans) > self._slots.num_free:
                raise PoolFullError(
                    f"pages: expected {needed} free pages for {len(spans)} users' events, got {free} of "
                    f"{self.key.shape[1]}. Hold fewer states, or give the pool more bytes."
                )
            grown = [
                self._growth(total, self._extended(*events, copies), self._extended(*slots, copies))
                for (events, slots), total in zip(spans, totals)
            ]
            if copies:
                old, new = torch.tensor(copies, device=self.key.device).T
                for pool in (self.key, self.value):
                    pool.index_copy_(1, new, pool.index_select(1, old))
        return grown

    def _extended(self, run: Run, had: int, total: int, copies: list[tuple[int, int]]) -> Run:
        """Return a run with room for tokens had..total-1 behind those it has, and note which pages are to be copied."""
        if total == had:
            return run
        first = run.first if len(run.places) else had // PAGE_ROWS
        places = run.places.tolist()
        if had % PAGE_ROWS and places and self._filled[places[-1]] != had % PAGE_ROWS:
            fresh = self._pages.take(1)[0]
            copies.append((places[-1], fresh))
            places[-1] = fresh
        places += self._pages.take((total - 1) // PAGE_ROWS + 1 - first - len(places))
        found = np.array(places, np.int64)
        self._filled[found[max(0, had // PAGE_ROWS - first) :]] = PAGE_ROWS
        self._filled[found[-1]] = (total - 1) % PAGE_ROWS + 1
        return self._pages.run(first, found)

    def _growth(self, total: int, events: Run, slots: Run) -> Growth:
        kept_events, kept_slots = (
            self._pages.run(max(run.first, start // PAGE_ROWS), run.places[max(0, start // PAGE_ROWS - run.first) :])
            for run, start in zip((events, slots), self._starts(total))
        )
        slot = self._slots.run(0, np.array(self._slots.take(1), np.int64))
        return Growth(events, slots, PagedMemory(total, self, kept_events, kept_slots, slot))


def _most_new(had: int, total: int) -> int:
    """Return the most pages that tokens had..total-1 take."""
    return 0 if total == had else (total - 1) // PAGE_ROWS + 1 - had // PAGE_ROWS
