"""For passes that are recorded as CUDA graphs: layouts of fixed sizes, and the tile maps that tell what is in them.

A launch of `summary_append`'s kernel knows its histories by the tile map and the page tables alone. So a recorded one
serves others of its size once their map and tables are copied over those it was recorded with. Rows of zeros fill a
map up: tiles without queries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ksa_kernels.layout import ChunkLayout, UserSpan
from ksa_kernels.summary_append.triton_append import FIELDS, plan_name, queries_a_tile, tile_rows

NUM_FIELDS: int = FIELDS.value


def sized_layout(
    like: ChunkLayout, num_events: int, closing: bool, tiles: Tensor, heads: tuple[int, int]
) -> ChunkLayout:
    """Return a layout of sizes alone, by which a pass is recorded.

    Args:
        like: has the chunk size, the window, and so on.
        num_events: queries, and as many users. closing: each closes a chunk, whose summaries ask too.
        tiles: int32 [at least as many as queries, 7], on the device: what is read when the recording is replayed.
        heads: of queries, and of keys.
    """
    span = UserSpan(1, query_start=0, key_start=0, first_query_chunk=0, first_key_chunk=0, num_summarised=int(closing))
    plans = {plan_name(queries_a_tile(*heads)): tiles}
    return replace(like, spans=(span,) * num_events, device=tiles.device, plans=plans)


def tile_map(layout: ChunkLayout, heads: tuple[int, int]) -> Tensor:
    """Return the tiles of a pass, int32 [at most its queries, 7], on the CPU."""
    rows = tile_rows(layout, queries_a_tile(*heads))
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, NUM_FIELDS)


def event_tiles(tiles: Tensor) -> Tensor:
    """Return those whose queries are events."""
    return tiles[tiles[:, 2] == 0]
