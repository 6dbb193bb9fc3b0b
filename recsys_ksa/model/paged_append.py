"""Append to memories in pages, and ask them: `append.py`'s pass, earlier rows read where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ksa_kernels import ChunkLayout
from ksa_kernels.summary_append import PagedCache, summary_append
from recsys_ksa.config import LayerKind
from recsys_ksa.model.network import Keep, Network, Rows
from recsys_ksa.model.pages import PagedMemory, PagePool, Run, ring_of, rows_of, table_of
from recsys_ksa.model.place import chunk_layout, place_arrivals
from recsys_ksa.model.rotary import rotary_table
from recsys_ksa.model.state import UserMemory, window_start

MOST_EVENTS = 256
"""New events of a user up to which this way is taken: the kernel is made for few queries a user."""


@dataclass(frozen=True)
class PagedRows:
    """Some users' rows of one layer, in pages."""

    cache: PagedCache

    @staticmethod
    def of(pool: PagePool, depth: int, event_table: Tensor, summary_table: Tensor) -> "PagedRows":
        """Return a layer's rows of the users whose pages the tables tell, int32 [U, ring] each."""
        return PagedRows(PagedCache(pool.pages(depth, event_table), pool.pages(depth, summary_table)))

    def attend(self, query: Tensor, summary_query: Tensor, layout: ChunkLayout, impl: str) -> tuple[Tensor, Tensor]:
        """Return what the queries see in them: see `SeenRows`."""
        dtype, device = self.cache.events.key.dtype, query.device.type
        with torch.autocast(device, enabled=False):
            seen = summary_append(query.to(dtype), summary_query.to(dtype), self.cache, layout, impl=impl)
        return seen.events, seen.summaries


def keep_in_pages(pool: PagePool, event_rows: Tensor, summary_rows: Tensor, *tables: Tensor) -> Keep:
    """Return what writes a pass's new rows where they belong, int64 rows of the pool, and reads by `tables`."""

    def keep(depth: int, _kind: LayerKind, rows: Rows) -> PagedRows:
        pool.write(depth, event_rows, rows.events)
        if len(summary_rows):
            pool.write(depth, summary_rows, rows.summaries)
        return PagedRows.of(pool, depth, *tables)

    return keep


def append_in_pages(
    network: Network,
    pool: PagePool,
    memories: Sequence[UserMemory],
    counts: Sequence[int],
    inputs: Tensor,
    attention_impl: str = "auto",
) -> list[PagedMemory]:
    """Return each user's memory after its new events; the old ones stay valid.

    Args:
        memories: one that is not in the pool's pages is brought there.
        counts: new events of each user, at least 1.
        inputs: of all users' new events, [n, E].

    Raises:
        PoolFullError: there is no room.
    """
    config, device = network.config, network.start.device
    held = [pool.hold(memory) for memory in memories]
    had = [memory.num_events for memory in held]
    totals = [before + new for before, new in zip(had, counts, strict=True)]
    key_start = [window_start(config, "summary", count) for count in had]
    layout = chunk_layout(config, "summary", [0, *accumulate(totals)], had, key_start)
    growth = pool.grow(held, totals)
    if pool.recorder is not None and pool.recorder.takes(len(inputs)):
        pool.recorder.append(layout, growth, inputs)
        return growth.memories
    place = place_arrivals(config, had, counts, {"summary": key_start}, device, network.dtype)
    rows = rows_of(growth.events, had, totals), rows_of(growth.summaries, *new_slots(layout))
    new_rows = (torch.from_numpy(each).to(device) for each in rows)
    keep = keep_in_pages(pool, *new_rows, *_tables(device, growth.events, growth.summaries))
    encoded = network.encode(inputs, place, attention_impl, keep=keep)
    last = torch.tensor([*accumulate(counts)], device=device) - 1
    pool.put_last_inputs(growth.memories, encoded.last_input[last])
    return growth.memories


def answer_in_pages(
    network: Network,
    pool: PagePool,
    memories: Sequence[UserMemory],
    request_bucket: Sequence[int],
    attention_impl: str = "auto",
    told: Tensor | None = None,
) -> Tensor:
    """Return the last block's output for each user's last event, [U, E]; every user has events."""
    config, device = network.config, network.start.device
    held = [pool.hold(memory) for memory in memories]
    counts = [memory.num_events for memory in held]
    last = [count - 1 for count in counts]
    key_start = [window_start(config, "summary", count) for count in counts]
    layout = chunk_layout(config, "summary", [0, *accumulate(counts)], last, key_start)
    if pool.recorder is not None and pool.recorder.takes(len(held)):
        return pool.recorder.answer(layout, held, request_bucket, told)
    tables = _tables(device, [memory.events for memory in held], [memory.summaries for memory in held])
    table_dtype = torch.float64 if network.dtype == torch.float64 else torch.float32
    return network.answer(
        pool.last_inputs(held),
        torch.tensor(request_bucket, device=device),
        PagedRows.of(pool, len(config.layer_kinds) - 1, *tables),
        layout.to(device),
        rotary_table(torch.tensor(last, device=device), config.head_dim, table_dtype),
        attention_impl=attention_impl,
        told=told,
    )


def new_slots(layout: ChunkLayout) -> tuple[list[int], list[int]]:
    """Return each user's first summary that is new in a pass, and the one behind the last."""
    m = layout.summaries_per_chunk
    first = [m * span.first_query_chunk for span in layout.spans]
    return first, [start + m * span.num_query_chunks for start, span in zip(first, layout.spans)]


def _tables(device: torch.device, *kinds: Sequence[Run]) -> list[Tensor]:
    """Return where the pages of each kind of the users' runs are, int32 [U, ring] each, on the device."""
    return [torch.from_numpy(table_of(runs, ring_of(runs))).to(device) for runs in kinds]
