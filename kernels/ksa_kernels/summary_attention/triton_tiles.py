"""Which tile each Triton program takes: built once a layout on the host from plain integers, heaviest users first.

Within a user, later tiles (which see more summaries) come first; tiles of one user stay together, so that their
windows, which overlap, are read from cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ksa_kernels.layout import ChunkLayout

FOREVER = 1 << 21
"""Stands for an infinite window or no cap, in chunks: longer than any history, small enough for int32 times 256."""


def users_table(layout: ChunkLayout) -> Tensor:
    """Return int64 [U, 8]: N, query_start, key_start, first chunk that asks, and what to add to an event or slot number
    for its row among event queries, event keys, summary queries and summary keys.
    """
    if "users" not in layout.plans:
        m = layout.summaries_per_chunk
        spans = torch.tensor(layout.spans, dtype=torch.int64).reshape(-1, 6)
        n, query_start, key_start, query_chunk, key_chunk, closed = spans.unbind(1)

        def shift(counts: Tensor, first: Tensor) -> Tensor:
            return counts.cumsum(0) - counts - first

        columns = [
            n,
            query_start,
            key_start,
            query_chunk,
            shift(n - query_start, query_start),
            shift(n - key_start, key_start),
            shift((closed - query_chunk).clamp_min(0) * m, query_chunk * m),
            shift((closed - key_chunk).clamp_min(0) * m, key_chunk * m),
        ]
        layout.plans["users"] = torch.stack(columns, 1).to(layout.device, non_blocking=True)
    return layout.plans["users"]


def tiles(layout: ChunkLayout, kind: str, block: int) -> Tensor:
    """Return int32 [tiles, 2]: user and first token of each tile of `block` tokens.

    kind: "queries" (events that ask), "events" (keys) or "summaries" (keys).
    """
    name = f"tiles {kind} {block}"
    if name not in layout.plans:
        layout.plans[name] = _tiles(layout, kind, block).to(layout.device, non_blocking=True)
    return layout.plans[name]


def _tiles(layout: ChunkLayout, kind: str, block: int) -> Tensor:
    spans = torch.tensor(layout.spans, dtype=torch.int64).reshape(-1, 6)
    n, query_start, key_start, _query_chunk, key_chunk, closed = spans.unbind(1)
    m = layout.summaries_per_chunk
    if kind == "queries":
        step = min(layout.chunk_size, block)
        first, stop = query_start // step * step, torch.where(query_start < n, n, 0)
    elif kind == "events":
        first, stop = key_start, n
    else:
        first, stop = key_chunk * m, closed * m
    count = (stop - first + block - 1).div(block, rounding_mode="floor").clamp_min(0)
    order = n.argsort(descending=True, stable=True)
    user = order.repeat_interleave(count[order])
    before = count[order].cumsum(0) - count[order]
    nth = torch.arange(len(user)) - before.repeat_interleave(count[order])
    # query tiles: the last ones see most; key tiles of summaries: the first ones are seen by most
    nth = count[user] - 1 - nth if kind == "queries" else nth
    return torch.stack([user, first[user] + nth * block], 1).to(torch.int32)
