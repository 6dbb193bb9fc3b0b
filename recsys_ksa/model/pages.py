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
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksa_kernels.summary_append import Pages
from recsys_ksa.config import ModelConfig
from recsys_ksa.errors import ConfigError, PoolFullError, StateError
from recsys_ksa.model.place import num_summaries
from recsys_ksa.model.state import LayerState, SharedRows, UserMemory, first_visible_chunk, window_start

if TYPE_CHECKING:
    from recsys_ksa.model.recorded import Recorder

PAGE_ROWS = 16
"""Tokens of a page: half a page a run is wasted at the mean, and a table has an entry a page."""

Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Run:
    """Where pages `first`, `first + 1`, ... of one kind of one history's tokens are."""

    first: int
    places: Places

    def since(self, token: int) -> "Run":
        """Return the run without pages that lie before a token's."""
        gone = max(0, token // PAGE_ROWS - self.first)
        return Run(self.first + gone, self.places[gone:])


NO_PAGES = Run(0, np.zeros(0, np.int64))


@dataclass(frozen=True)
class Span:
    """Tokens had..total-1 of one kind that a run is to have room for, behind those it has."""

    run: Run
    had: int
    total: int

    @property
    def most_new(self) -> int:
        """The most pages they take."""
        return 0 if self.total == self.had else (self.total - 1) // PAGE_ROWS + 1 - self.had // PAGE_ROWS


@dataclass(frozen=True, eq=False)
class PagedMemory:
    """A `UserMemory` in a pool's pages."""

    num_events: int
    pool: "PagePool"
    events: Run
    summaries: Run
    input_place: int
    """Of the last event's input to the last block; unused before any event."""

    @property
    def layers(self) -> tuple[LayerState, ...]:
        """The rows, copied out of the pages."""
        return self.pool.layers(self)

    @property
    def last_input(self) -> Tensor:
        """[E]; zeros before any event."""
        row = self.pool.inputs[self.input_place]
        return row.clone() if self.num_events else torch.zeros_like(row)

    @property
    def nbytes(self) -> int:
        """K/V bytes over all layers: of whole pages."""
        return (len(self.events.places) + len(self.summaries.places)) * self.pool.page_bytes


@dataclass(frozen=True, eq=False)
class Growth:
    """Room for some users' new events and summaries. Pages that no memory keeps are held as long as this is.

    events, summaries: each user's run of all that its new tokens may see, they themselves among them.
    memories: what is held afterwards.
    """

    events: list[Run]
    summaries: list[Run]
    memories: list[PagedMemory]


class PagePool:
    """Pages on one device for memories of one network. Safe to share between threads.

    key, value: [L, pages + 1, PAGE_ROWS, H_kv, D]; inputs: [pages + 1, E].
    """

    def __init__(
        self, config: ModelConfig, num_bytes: int, dtype: torch.dtype, input_dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take the device's memory.

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
        self.spare = count
        """A page, and a place among the inputs, that are never dealt out: what is written there nobody reads."""
        self.key, self.value = (
            torch.zeros(len(config.layer_kinds), count + 1, *shape, dtype=dtype, device=device) for _ in range(2)
        )
        self.inputs = torch.zeros(count + 1, config.dim, dtype=input_dtype, device=device)
        self.recorder: Recorder | None = None
        """Replays passes over few events; None: each is launched operator by operator."""
        self._pages, self._inputs = _Dealer(count), _Dealer(count)
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
        return PagedMemory(0, self, NO_PAGES, NO_PAGES, 0)

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
        (event_start, slot_start), num_slots = self._starts(total), self._num_slots(total)
        growth = self._deal([Span(NO_PAGES, event_start, total)], [Span(NO_PAGES, slot_start, num_slots)], [total])
        event_rows = torch.from_numpy(rows_of(growth.events, [event_start], [total])).to(self.key.device)
        slot_rows = torch.from_numpy(rows_of(growth.summaries, [slot_start], [num_slots])).to(self.key.device)
        for depth, layer in enumerate(memory.layers):
            if (layer.events.num_rows, layer.summaries.num_rows) != (len(event_rows), len(slot_rows)):
                raise StateError(
                    f"pages: expected {len(event_rows)} events' and {len(slot_rows)} summaries' rows in layer {depth}, "
                    f"got {layer.events.num_rows} and {layer.summaries.num_rows}. Replay a cold state first."
                )
            self.write(depth, event_rows, layer.events.whole())
            self.write(depth, slot_rows, layer.summaries.whole())
        self.put_last_inputs(growth.memories, memory.last_input[None])
        return growth.memories[0]

    def grow(self, memories: Sequence[PagedMemory], totals: Sequence[int]) -> Growth:
        """Return room for each user's events up to `totals`, more than there were, and the summaries they close.

        Raises:
            PoolFullError: there is not enough; nothing has changed then.
        """
        had, slots = [memory.num_events for memory in memories], self._num_slots
        return self._deal(
            [Span(memory.events, *span) for memory, *span in zip(memories, had, totals, strict=True)],
            [
                Span(memory.summaries, slots(before), slots(after))
                for memory, before, after in zip(memories, had, totals)
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
        return self.inputs[torch.tensor([memory.input_place for memory in memories], device=self.inputs.device)]

    def put_last_inputs(self, memories: Sequence[PagedMemory], inputs: Tensor) -> None:
        """Keep the last block's input of each one's last event, [U, E], in a place that nobody reads yet."""
        places = torch.tensor([memory.input_place for memory in memories], device=self.inputs.device)
        self.inputs.index_copy_(0, places, inputs.to(self.inputs.dtype))

    def layers(self, memory: PagedMemory) -> tuple[LayerState, ...]:
        """Return a memory's rows, copied out; segments of summaries as `SharedRows` cuts them."""
        total = memory.num_events
        event_start, slot_start = self._starts(total)
        events, slots = (
            torch.from_numpy(rows_of([run], [start], [stop])).to(self.key.device)
            for run, start, stop in (
                (memory.events, event_start, total),
                (memory.summaries, slot_start, self._num_slots(total)),
            )
        )

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

    def _deal(self, events: Sequence[Span], summaries: Sequence[Span], totals: Sequence[int]) -> Growth:
        """Return room for each user's spans; histories are `totals` long then."""
        needed = sum(span.most_new for span in (*events, *summaries))
        copies: list[tuple[int, int]] = []
        with self._lock:
            free = self._pages.num_free
            if needed > free or len(totals) > self._inputs.num_free:
                raise PoolFullError(
                    f"pages: expected {needed} free pages for {len(totals)} users' events, got {free} of "
                    f"{self.spare}. Hold fewer states, or give the pool more bytes."
                )
            event_runs = [self._extended(span, copies) for span in events]
            slot_runs = [self._extended(span, copies) for span in summaries]
            memories: list[PagedMemory] = []
            for total, run, slots, place in zip(totals, event_runs, slot_runs, self._inputs.take(len(totals))):
                event_start, slot_start = self._starts(total)
                memory = PagedMemory(total, self, run.since(event_start), slots.since(slot_start), place)
                self._pages.hold(memory, np.concatenate((memory.events.places, memory.summaries.places)))
                self._inputs.hold(memory, np.array([place]))
                memories.append(memory)
            growth = Growth(event_runs, slot_runs, memories)
            self._pages.hold(growth, np.concatenate([run.places for run in (*event_runs, *slot_runs)]))
            if copies:
                old, new = torch.tensor(copies, device=self.key.device).T
                for pool in (self.key, self.value):
                    pool.index_copy_(1, new, pool.index_select(1, old))
        return growth

    def _extended(self, span: Span, copies: list[tuple[int, int]]) -> Run:
        """Return a span's run with room for it, and note which pages are to be copied."""
        run, had, total = span.run, span.had, span.total
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
        return Run(first, found)


class _Dealer:
    """Deals out numbered places and takes back those that nothing holds. Its user holds a lock."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._holders = np.zeros(count, np.int32)
        self._given_back: deque[Places] = deque()

    @property
    def num_free(self) -> int:
        """Places that could be taken."""
        back = [self._given_back.popleft() for _ in range(len(self._given_back))]
        if back:
            places = np.concatenate(back)
            np.subtract.at(self._holders, places, 1)
            self._free.extend(np.unique(places[self._holders[places] == 0]).tolist())
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return so many places; `num_free` has told that there are."""
        return [self._free.pop() for _ in range(count)]

    def hold(self, holder: object, places: Places) -> None:
        """Keep places, which others may hold too, until `holder` is gone."""
        np.add.at(self._holders, places, 1)
        # Called wherever Python collects the holder, so it takes no lock.
        weakref.finalize(holder, self._given_back.append, places).atexit = False


def tokens_of(starts: Sequence[int], stops: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return whose each of the tokens start..stop-1 of several users is, and its number, user by user."""
    begin = np.array(starts, np.int64)
    count = np.array(stops, np.int64) - begin
    whose = np.arange(len(begin)).repeat(count)
    return whose, np.arange(count.sum()) - (np.cumsum(count) - count)[whose] + begin[whose]


def rows_of(runs: Sequence[Run], starts: Sequence[int], stops: Sequence[int]) -> NDArray[np.int64]:
    """Return where each run's tokens start..stop-1 are, in rows of the pool, run by run."""
    whose, token = tokens_of(starts, stops)
    first = np.array([run.first for run in runs])
    held = np.cumsum([0, *(len(run.places) for run in runs)])[:-1]
    page = np.concatenate([run.places for run in runs])[token // PAGE_ROWS - first[whose] + held[whose]]
    return page * PAGE_ROWS + token % PAGE_ROWS


def ring_of(runs: Sequence[Run]) -> int:
    """Return how wide a table of these runs has to be: a cache wants a page more than it may need."""
    return max(len(run.places) for run in runs) + 1


def table_of(runs: Sequence[Run], ring: int) -> NDArray[np.int32]:
    """Return int32 [U, ring]: where page number n of each user is, at n % ring."""
    whose, number = tokens_of([run.first for run in runs], [run.first + len(run.places) for run in runs])
    table = np.zeros((len(runs), ring), np.int32)
    table[whose, number % ring] = np.concatenate([run.places for run in runs])
    return table
