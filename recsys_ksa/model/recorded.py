"""Passes over few new events, and questions, as CUDA graphs: what takes hundreds of launches takes one.

A recording has sizes: so many events (and users), with room for the summaries of as many chunks that close, and tables
so many pages wide. A pass that fits is padded to them: rows that are nobody's are written to the pool's spare page, and
nobody reads what becomes of them. Passes of one size then differ in numbers only, which are copied in before the
recording is replayed. What a row becomes does not depend on the others, so padding changes no answer, but for the
order in which a matrix product of another size sums (float32: within 1e-5).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ksa_kernels import ChunkLayout
from ksa_kernels.impl import Impl
from ksa_kernels.summary_append.api import chosen_impl
from ksa_kernels.summary_append.recorded import NUM_FIELDS, sized_layout, tile_map
from recsys_ksa.model.network import Network
from recsys_ksa.model.paged_append import PagedRows, keep_in_pages, new_slots
from recsys_ksa.model.pages import PAGE_ROWS, Growth, PagedMemory, PagePool, ring_of, rows_of, table_of, tokens_of
from recsys_ksa.model.place import Place, chunk_layout, num_summaries
from recsys_ksa.model.rotary import rotary_table, summary_position

MOST_EVENTS = 512
"""Of a pass that is recorded; in longer ones launches are a small part of the time."""
Graphs = Any
"""Memory of CUDA graphs; None where there are none."""
NARROWEST = 16
"""Pages of the narrowest table; the next ones are each 8 times as wide."""


class Size(NamedTuple):
    """What a recording has room for: new events (or questions), and pages of events and of summaries of each user."""

    events: int
    event_pages: int
    summary_pages: int

    @staticmethod
    def of(num_events: int, event_pages: int, summary_pages: int) -> "Size":
        """Return the smallest that fits."""
        return Size(_power_of_two(num_events), _width(event_pages), _width(summary_pages))


class Recorder:
    """Records passes of one network over one pool's pages, and replays them. Safe to share between threads.

    Args:
        attention_impl: one that reads pages by a tile map: the Triton kernel.
    """

    def __init__(self, network: Network, pool: PagePool, attention_impl: str = "triton") -> None:
        self._network, self._pool, self._impl = network, pool, attention_impl
        self._appends: dict[Size, AppendRecording] = {}
        self._answers: dict[Size, AnswerRecording] = {}
        self._graphs: Graphs = torch.cuda.graph_pool_handle() if network.start.is_cuda else None
        self._lock = threading.Lock()

    @staticmethod
    def of(network: Network, pool: PagePool) -> "Recorder | None":
        """Return a recorder; None where the network does not run by the kernel on CUDA."""
        where, head_dim = network.start.device, network.config.head_dim
        kernel = where.type == "cuda" and chosen_impl("auto", where, network.state_dtype, head_dim) is Impl.TRITON
        return Recorder(network, pool) if kernel and network.dtype != torch.float64 else None

    def takes(self, num_events: int) -> bool:
        """Return whether a pass of so many events, or questions, is recorded."""
        return num_events <= MOST_EVENTS

    @torch.inference_mode()
    def warm_up(self, most: int, widths: Sequence[int] = (NARROWEST, 8 * NARROWEST, 64 * NARROWEST)) -> None:
        """Record passes of every size up to `most` events, and tables of summaries so many pages wide."""
        sizes = {Size.of(count, NARROWEST, width) for count in range(1, most + 1) for width in widths}
        with self._lock:
            for size in tqdm(sorted(sizes), desc="recording passes", disable=None):
                self._append_recording(size)
                self._answer_recording(size)

    def append(self, layout: ChunkLayout, growth: Growth, inputs: Tensor) -> None:
        """Write what a pass over new events leaves into the room that the pool has dealt out for it.

        Args:
            layout: of the users' whole histories; the events that ask are the new ones.
            inputs: of all users' new events, [n, E].
        """
        config, m = self._network.config, layout.summaries_per_chunk
        had, totals = [span.query_start for span in layout.spans], [span.num_events for span in layout.spans]
        slots = new_slots(layout)
        _, slot = tokens_of(*slots)
        with self._lock:
            recording = self._append_recording(Size.of(len(inputs), ring_of(growth.events), ring_of(growth.summaries)))
            recording.inputs[: len(inputs)].copy_(inputs)
            recording.numbers.set(
                position=tokens_of(had, totals)[1],
                slot=slot % max(m, 1),
                summary_position=summary_position(slot // max(m, 1), slot % max(m, 1), config.chunk_size, max(m, 1)),
                event_rows=rows_of(growth.events, had, totals),
                summary_rows=rows_of(growth.summaries, *slots),
                last=np.cumsum(np.array(totals, np.int64) - np.array(had, np.int64)) - 1,
                input_places=np.array([memory.input_place for memory in growth.memories]),
            )
            recording.maps.set(
                events=table_of(growth.events, recording.maps.width("events")),
                summaries=table_of(growth.summaries, recording.maps.width("summaries")),
                tiles=_tiles(self._network, layout),
            )
            recording.replay()

    def answer(
        self, layout: ChunkLayout, memories: Sequence[PagedMemory], request_bucket: Sequence[int], told: Tensor | None
    ) -> Tensor:
        """Return the last block's output for each user's last event, [U, E].

        Args:
            layout: of the users' whole histories; the events that ask are the last ones.
            told: what each question tells beside the history, [U, E].
        """
        events, summaries = [memory.events for memory in memories], [memory.summaries for memory in memories]
        tiles = _tiles(self._network, layout)
        with self._lock:
            recording = self._answer_recording(Size.of(len(memories), ring_of(events), ring_of(summaries)))
            if recording.told is not None and told is not None:
                recording.told[: len(told)].copy_(told)
            recording.numbers.set(
                position=np.array([memory.num_events - 1 for memory in memories]),
                bucket=np.array(request_bucket),
                input_places=np.array([memory.input_place for memory in memories]),
            )
            recording.maps.set(
                events=table_of(events, recording.maps.width("events")),
                summaries=table_of(summaries, recording.maps.width("summaries")),
                tiles=tiles[tiles[:, 2] == 0],  # of queries that are events
            )
            recording.replay()
            return recording.hidden[: len(memories)].clone()

    def _append_recording(self, size: Size) -> "AppendRecording":
        if size not in self._appends:
            self._appends[size] = AppendRecording(self._network, self._pool, size, self._impl, self._graphs)
        return self._appends[size]

    def _answer_recording(self, size: Size) -> "AnswerRecording":
        if size not in self._answers:
            self._answers[size] = AnswerRecording(self._network, self._pool, size, self._impl, self._graphs)
        return self._answers[size]


class Numbers:
    """Integers of a recording, by name: set on the host, read on the device. What is not set is nobody's.

    Args:
        shapes: of each; `nobody`: what they are where nothing is set, 0 unless told.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        shapes: Mapping[str, tuple[int, ...]],
        nobody: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        stops = [*accumulate(-(-prod(shape) // 16) * 16 for shape in shapes.values())]  # aligned, as kernels like it
        places = dict(zip(shapes, zip([0, *stops], shapes.values())))
        host = torch.zeros(stops[-1], dtype=dtype)
        self._on_host = host.numpy()
        self._on_device = host.to(device)
        self._set = {name: _part(self._on_host, *place) for name, place in places.items()}
        self._read = {name: _part(self._on_device, *place) for name, place in places.items()}
        for name, value in nobody.items():
            self._set[name][...] = value
        self._nobodys = self._on_host.copy()
        self._upload()

    def __getitem__(self, name: str) -> Tensor:
        """Return what is read, on the device."""
        return self._read[name]

    def width(self, name: str) -> int:
        """Return how wide a table is."""
        return self._read[name].shape[1]

    def set(self, **values: NDArray[np.integer]) -> None:
        """Set the first rows of each; the others are nobody's."""
        self._on_host[:] = self._nobodys
        for name, rows in values.items():
            self._set[name][: len(rows)] = rows
        self._upload()

    def _upload(self) -> None:
        self._on_device.copy_(torch.from_numpy(self._on_host), non_blocking=True)


class AppendRecording:
    """A pass over so many new events.

    inputs: of the new events, [n, E], set by the caller.
    """

    def __init__(self, network: Network, pool: PagePool, size: Size, impl: str, graphs: Graphs) -> None:
        config, device = network.config, network.start.device
        num_events, num_slots = size.events, size.events * num_summaries(config)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("position", "event_rows", "last", "input_places"), (num_events,)
        )
        shapes |= dict.fromkeys(("slot", "summary_position", "summary_rows"), (num_slots,))
        spare_row = pool.spare * PAGE_ROWS
        nobody = {"event_rows": spare_row, "summary_rows": spare_row, "input_places": pool.spare}
        self.inputs = torch.zeros(size.events, config.dim, dtype=network.dtype, device=device)
        self.numbers = numbers = Numbers(torch.int64, device, shapes, nobody)
        self.maps = maps = _maps(device, size, num_events + num_slots)
        layout = _sized(network, num_events, num_slots > 0, maps["tiles"])

        def run() -> Tensor:
            rotary = [
                rotary_table(numbers[name], config.head_dim, torch.float32) for name in ("position", "summary_position")
            ]
            place = Place({"summary": layout}, rotary[0], rotary[1], numbers["slot"], (), ())
            rows, tables = ("event_rows", "summary_rows"), ("events", "summaries")
            keep = keep_in_pages(pool, *(numbers[name] for name in rows), *(maps[name] for name in tables))
            encoded = network.encode(self.inputs, place, impl, keep=keep)
            pool.inputs.index_copy_(
                0, numbers["input_places"], encoded.last_input[numbers["last"]].to(pool.inputs.dtype)
            )
            return pool.inputs

        self._layout = layout  # its plans hold what the launches count with
        self.replay, _ = _recorded(run, network, graphs)


class AnswerRecording:
    """Questions of so many users, of their last events.

    told: what each question tells beside the history, [U, E], set by the caller; None where the network is told
    nothing. hidden: the answer, [U, E], after a replay and before the next.
    """

    def __init__(self, network: Network, pool: PagePool, size: Size, impl: str, graphs: Graphs) -> None:
        config, device = network.config, network.start.device
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("position", "bucket", "input_places"), (size.events,))
        told = (
            None
            if network.question is None
            else torch.zeros(size.events, config.dim, dtype=network.dtype, device=device)
        )
        self.told = told
        self.numbers = numbers = Numbers(torch.int64, device, shapes, {"input_places": pool.spare})
        self.maps = maps = _maps(device, size, size.events)
        layout = _sized(network, size.events, False, maps["tiles"])

        def run() -> Tensor:
            rows = PagedRows.of(pool, len(config.layer_kinds) - 1, maps["events"], maps["summaries"])
            rotary = rotary_table(numbers["position"], config.head_dim, torch.float32)
            asked = pool.inputs[numbers["input_places"]]
            return network.answer(asked, numbers["bucket"], rows, layout, rotary, attention_impl=impl, told=told)

        self._layout = layout  # its plans hold what the launches count with
        self.replay, self.hidden = _recorded(run, network, graphs)


def _recorded(run: Callable[[], Tensor], network: Network, graphs: Graphs) -> tuple[Callable[[], object], Tensor]:
    """Return what runs a pass again, and the tensor its result is in then; on a CPU it is run as it is.

    Args:
        graphs: the memory that all recordings share; they are replayed one at a time.
    """
    # A cast of a weight must be part of the recording: outside it is thrown away with the autocast that made it.
    with torch.autocast(network.start.device.type, torch.bfloat16, network.precision == "bf16", cache_enabled=False):
        result = run()  # compiles kernels and readies libraries, which cannot be recorded
        if graphs is None:
            return lambda: result.copy_(run()), result
        graph, apart = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        apart.wait_stream(torch.cuda.current_stream())
        # Not torch.cuda.graph(): it collects garbage and empties the allocator's cache first, while others wait.
        with torch.cuda.stream(apart):
            graph.capture_begin(graphs, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
    return graph.replay, result


def _maps(device: torch.device, size: Size, num_tiles: int) -> Numbers:
    """Return the page tables of so many users, and the tiles, that `summary_append`'s kernel reads."""
    tables = {"events": (size.events, size.event_pages), "summaries": (size.events, size.summary_pages)}
    return Numbers(torch.int32, device, {**tables, "tiles": (num_tiles, NUM_FIELDS)})


def _sized(network: Network, num_events: int, closing: bool, tiles: Tensor) -> ChunkLayout:
    like = chunk_layout(network.config, "summary", [0])
    return sized_layout(like, num_events, closing, tiles, _heads(network))


def _tiles(network: Network, layout: ChunkLayout) -> NDArray[np.int32]:
    """Return what the kernel's programs do, int32 [tiles, 7]."""
    return tile_map(layout, _heads(network)).numpy()


def _heads(network: Network) -> tuple[int, int]:
    return network.config.num_heads, network.config.num_kv_heads


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << max(0, count - 1).bit_length()


def _width(pages: int) -> int:
    """Return the width of the narrowest table that has room for so many pages."""
    width = NARROWEST
    while width < pages:
        width *= 8
    return width


def _part(buffer: Any, start: int, shape: tuple[int, ...]) -> Any:
    """Return the numbers of a buffer from `start` on, in their shape."""
    return buffer[start : start + prod(shape)].reshape(shape)
