"""Append to memories in pages, and ask them: `append.py`'s pass, earlier rows read where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ksa_kernels import ChunkLayout
from ksa_kernels.layout import UserSpan
from ksa_kernels.summary_append import PagedCache, summary_append
from recsys_ksa.config import LayerKind
from recsys_ksa.model.network import Network, Rows
from recsys_ksa.model.pages import PagedMemory, PagePool, rows_of, table_of
from recsys_ksa.model.place import chunk_layout, place_arrivals
from recsys_ksa.model.rotary import rotary_table
from recsys_ksa.model.state import UserMemory, window_start

MOST_EVENTS = 256
"""New events of a user up to which this way is taken: the kernel is made for few queries a user."""


@dataclass(frozen=True)
class PagedRows:
    """Some users' rows of one layer, in pages."""

    cache: PagedCache

    def attend(self, query: Tensor, summary_query: Tensor, layout: ChunkLayout, impl: str) -> tuple[Tensor, Tensor]:
        """Return what the queries see in them: see `SeenRows`."""
        dtype, device = self.cache.events.key.dtype, query.device.type
        with torch.autocast(device, enabled=False):
            seen = summary_append(query.to(dtype), summary_query.to(dtype), self.cache, layout, impl=impl)
        return seen.events, seen.summaries


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
    key_start: dict[LayerKind, list[int]] = {"summary": [window_start(config, "summary", count) for count in had]}
    place = place_arrivals(config, had, counts, key_start, device, network.dtype)
    spans = place.layouts["summary"].spans
    m = place.layouts["summary"].summaries_per_chunk
    growth = pool.grow(held, totals)
    first_slots, last_slots = ([m * chunk for chunk in chunks] for chunks in zip(*(_closed(span) for span in spans)))
    tables = table_of(growth.events), table_of(growth.summaries)
    new_rows = rows_of(growth.events, had, totals), rows_of(growth.summaries, first_slots, last_slots)
    event_table, summary_table, event_rows, summary_rows = (
        torch.from_numpy(part).to(device) for part in (*tables, *new_rows)
    )

    def keep(depth: int, _kind: LayerKind, rows: Rows) -> PagedRows:
        pool.write(depth, event_rows, rows.events)
        if len(summary_rows):
            pool.write(depth, summary_rows, rows.summaries)
        return PagedRows(PagedCache(pool.pages(depth, event_table), pool.pages(depth, summary_table)))

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
    layout = chunk_layout(config, "summary", [0, *accumulate(counts)], last, key_start).to(device)
    tables = table_of([memory.events for memory in held]), table_of([memory.summaries for memory in held])
    pages = [pool.pages(len(config.layer_kinds) - 1, torch.from_numpy(table).to(device)) for table in tables]
    table_dtype = torch.float64 if network.dtype == torch.float64 else torch.float32
    return network.answer(
        pool.last_inputs(held),
        torch.tensor(request_bucket, device=device),
        PagedRows(PagedCache(*pages)),
        layout,
        rotary_table(torch.tensor(last, device=device), config.head_dim, table_dtype),
        attention_impl=attention_impl,
        told=told,
    )


def _closed(span: UserSpan) -> tuple[int, int]:
    """Return the first chunk whose summaries are new, and the one behind the last."""
    return span.first_query_chunk, span.first_query_chunk + span.num_query_chunks
