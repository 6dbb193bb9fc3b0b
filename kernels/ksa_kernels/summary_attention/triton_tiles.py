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
    """Return int64 [U, 8], on the CPU: N, query_start, key_start, number of summaries, and what to add to an event or
    slot number for its row among event queries, event keys, summary queries and summary keys.
    """
    if "users" not in layout.plans:
        m = layout.summaries_per_chunk
        n, query_start, key_start, query_chunk, key_chunk, summarised = _spans(layout)

        def shift(counts: Tensor, first: Tensor) -> Tensor:
            return counts.cumsum(0) - counts - first

        columns = [
            n,
            query_start,
            key_start,
            summarised * m,
            shift(n - query_start, query_start),
            shift(n - key_start, key_start),
            shift((summarised - query_chunk).clamp_min(0) * m, query_chunk * m),
            shift((summarised - key_chunk).clamp_min(0) * m, key_chunk * m),
        ]
        layout.plans["users"] = torch.stack(columns, 1)
    return layout.plans["users"]


def tiles(layout: ChunkLayout, kind: str, block: int) -> Tensor:
    """Return int32 [tiles, 9]: first token of each tile of `block` tokens, and its user's row of `users_table`.

    One row of it is all that a program looks up. kind: "queries" (events that ask), "events" (keys) or "summaries"
    (keys).
    """
    name = f"tiles {kind} {block}"
    if name not in layout.plans:
        user, first = _tiles(layout, kind, block)
        rows = torch.cat([first[:, None], users_table(layout)[user]], 1).to(torch.int32)
        layout.plans[name] = rows.to(layout.device, non_blocking=True)
    return layout.plans[name]


def _spans(layout: ChunkLayout) -> tuple[Tensor, ...]:
    """Return the fields of the users' spans, int64 [U] each."""
    return torch.tensor(layout.spans, dtype=torch.int64).reshape(-1, 6).unbind(1)


def _tiles(layout: ChunkLayout, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Return user and first token of each tile."""
    n, query_start, key_start, _query_chunk, key_chunk, summarised = _spans(layout)
    m = layout.summaries_per_chunk
    if kind == "queries":
        step = min(layout.chunk_size, block)
        first, stop = query_start // step * step, torch.where(query_start < n, n, 0)
    elif kind == "events":
        first, stop = key_start, n
    else:
        first, stop = key_chunk * m, summarised * m
    count = (stop - first + block - 1).div(block, rounding_mode="floor").clamp_min(0)
    order = n.argsort(descending=True, stable=True)
    user = order.repeat_interleave(count[order])
    before = count[order].cumsum(0) - count[order]
    nth = torch.arange(len(user)) - before.repeat_interleave(count[order])
    # query tiles: the last ones see most; key tiles of summaries: the first ones are seen by most
    nth = count[user] - 1 - nth if kind == "queries" else nth
    return user, first[user] + nth * block
