"""Append in Triton: one launch for all users' new events and the summaries they close, keys read from pages in place.

A program takes a few queries of one user, all query heads of one key head (rows = queries x G), and every
`SPLITS`-th tile of the keys they see; of the programs that share rows, the last one to finish joins the splits:

    lse = log2 sum_s 2**lse_s,   out = sum_s 2**(lse_s - lse) out_s

always in the same order, so results are the same every time. Who is last is counted on the device; it sets the
count back to 0 for the next launch.

Shapes depend on the tile map only, so a captured CUDA graph serves new lengths by copying a new map and table.

Letters: H heads, G query heads a key head, D head dim, K chunk_size, M summaries_per_chunk, P page size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ksa_kernels._triton import HIDDEN, LN2, first_seen, old_start, old_stop
from ksa_kernels.layout import ChunkLayout
from ksa_kernels.summary_append.cache import PagedCache, Pages
from ksa_kernels.summary_attention.triton_tiles import FOREVER, users_table

FIELDS = tl.constexpr(7)
LOG2E = 1.4426950408889634
BLOCK_N = 64
STAGES = 3
PROGRAMS = 528
"""Programs that fill an H100: four a multiprocessor."""
MOST_SPLITS = 64


@triton.jit(do_not_specialize=["window", "visible", "num_event_rows", "num_rows", "event_ring", "summary_ring"])
def append_kernel(
    eq_ptr, sq_ptr, ek_ptr, ev_ptr, sk_ptr, sv_ptr, event_table_ptr, summary_table_ptr,
    part_ptr, part_lse_ptr, count_ptr, eo_ptr, so_ptr, elsep_ptr, slsep_ptr, tiles_ptr,
    scale, window, visible, num_event_rows, num_rows, event_ring, summary_ring,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, CAPPED: tl.constexpr,
    EVENT_PAGE: tl.constexpr, SUMMARY_PAGE: tl.constexpr, SPLITS: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = H // G
    kv_head = tl.program_id(0) % J
    tile = tl.program_id(0) // J
    split = tl.program_id(1)
    fields = tiles_ptr + tile * FIELDS
    user = tl.load(fields).to(tl.int64)
    start = tl.load(fields + 1)
    is_summary = tl.load(fields + 2) == 1
    n, key_start, num_slots = tl.load(fields + 3), tl.load(fields + 4), tl.load(fields + 5)
    shift = tl.load(fields + 6).to(tl.int64)

    # rows: query (start + row // G) of head kv_head * G + row % G; a query is an event or a summary slot
    offsets = tl.arange(0, ROWS)
    query = start + offsets // G
    head = kv_head * G + offsets % G
    chunk = tl.where(is_summary, query // tl.maximum(M, 1), query // K)
    stop = tl.minimum(start + QUERIES, tl.where(is_summary, num_slots, n))
    exists = (query < stop) & (offsets < QUERIES * G)
    chunk_first = tl.where(is_summary, start // tl.maximum(M, 1), start // K)
    chunk_last = tl.where(is_summary, (stop - 1) // tl.maximum(M, 1), (stop - 1) // K)

    # what each row sees, [low, high) of events and of summaries, and what any row sees
    low_event = tl.where(is_summary, chunk * K, first_seen(chunk, window, key_start, K))
    high_event = tl.where(is_summary, (chunk + 1) * K, query + 1)
    low_slot = tl.where(is_summary, chunk * M, old_start(chunk, window, visible, M, CAPPED))
    high_slot = tl.where(is_summary, query + 1, old_stop(chunk, window, M))
    event_first = tl.where(is_summary, chunk_first * K, first_seen(chunk_first, window, key_start, K))
    event_stop = tl.where(is_summary, (chunk_last + 1) * K, stop)
    slot_first = tl.where(is_summary, chunk_first * M, old_start(chunk_first, window, visible, M, CAPPED))
    slot_end = tl.where(is_summary, stop, old_stop(chunk_last, window, M))
    event_tiles = tl.cdiv(event_stop - event_first, BLOCK_N)
    slot_tiles = tl.cdiv(tl.maximum(slot_end - slot_first, 0), BLOCK_N)

    offsets_d = tl.arange(0, D)
    rows = shift + query
    q_ptr = tl.where(is_summary, sq_ptr, eq_ptr)
    q = tl.load(q_ptr + (rows * H + head)[:, None] * D + offsets_d[None, :], mask=exists[:, None], other=0.0)
    acc = tl.zeros([ROWS, D], tl.float32)
    top = tl.full([ROWS], HIDDEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for t in range(split, event_tiles + slot_tiles, SPLITS):
        old = t >= event_tiles
        tokens = tl.where(old, slot_first + (t - event_tiles) * BLOCK_N, event_first + t * BLOCK_N)
        tokens = tokens + tl.arange(0, BLOCK_N)
        given = tokens < tl.where(old, slot_end, event_stop)
        ring = tl.where(old, summary_ring, event_ring)
        page_size = tl.where(old, SUMMARY_PAGE, EVENT_PAGE)
        table = tl.where(old, summary_table_ptr, event_table_ptr) + user * ring
        page = tl.load(table + (tokens // page_size) % ring, mask=given, other=0).to(tl.int64)
        at = ((page * page_size + tokens % page_size) * J + kv_head) * D
        pointers = at[:, None] + offsets_d[None, :]
        k = tl.load(tl.where(old, sk_ptr, ek_ptr) + pointers, mask=given[:, None], other=0.0)
        v = tl.load(tl.where(old, sv_ptr, ev_ptr) + pointers, mask=given[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        low = tl.where(old, low_slot, low_event)[:, None]
        high = tl.where(old, high_slot, high_event)[:, None]
        seen = (tokens[None, :] >= low) & (tokens[None, :] < high)
        scores = tl.where(seen, scores, HIDDEN)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        # a split may hold no key of a row: then nothing may be added, whatever the maximum is
        weights = tl.where(seen, tl.exp2(scores - new_top[:, None]), 0.0)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    saw = total > 0
    out = acc / tl.where(saw, total, 1.0)[:, None]
    lse2 = tl.where(saw, top + tl.log2(tl.where(saw, total, 1.0)), HIDDEN)
    out_ptr, lse_ptr = tl.where(is_summary, so_ptr, eo_ptr), tl.where(is_summary, slsep_ptr, elsep_ptr)
    if SPLITS == 1:
        at = rows * H + head
        tl.store(out_ptr + at[:, None] * D + offsets_d[None, :], out.to(eo_ptr.dtype.element_ty), mask=exists[:, None])
        tl.store(lse_ptr + at, lse2 * LN2, mask=exists)
    else:
        first_row = tl.where(is_summary, num_event_rows, 0)
        at = (split * num_rows + first_row + rows) * H + head
        tl.store(part_ptr + at[:, None] * D + offsets_d[None, :], out, mask=exists[:, None])
        tl.store(part_lse_ptr + at, lse2, mask=exists)
        tl.debug_barrier()  # all threads' parts are written before the program counts itself
        if tl.atomic_add(count_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1:
            for r in range((stop - start) * G):
                row = (shift + start + r // G) * H + kv_head * G + r % G
                part = (tl.arange(0, SPLITS).to(tl.int64) * num_rows + first_row) * H + row
                part_lse = tl.load(part_lse_ptr + part, cache_modifier=".cg")
                parts = tl.load(part_ptr + part[:, None] * D + offsets_d[None, :], cache_modifier=".cg")
                most = tl.max(part_lse, 0)
                shares = tl.exp2(part_lse - most)
                whole = tl.sum(shares, 0)
                joined = tl.sum(shares[:, None] * parts, 0) / whole
                tl.store(out_ptr + row * D + offsets_d, joined.to(eo_ptr.dtype.element_ty))
                tl.store(lse_ptr + row, (most + tl.log2(whole)) * LN2)
            tl.store(count_ptr + tl.program_id(0), 0)


def attend(
    event_query: Tensor, summary_query: Tensor, cache: PagedCache, layout: ChunkLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return events [Tq, H, D], summaries [Sq, H, D] and their log-sum-exps [Tq, H], [Sq, H]."""
    num_heads, head_dim = event_query.shape[1:]
    num_kv_heads = cache.events.key.shape[2]
    group = num_heads // num_kv_heads
    queries = queries_a_tile(num_heads, num_kv_heads)
    where = _tiles(layout, queries)
    splits = _splits(len(where) * num_kv_heads)
    num_rows = len(event_query) + len(summary_query)
    num_parts = splits * num_rows if splits > 1 else 0
    part = event_query.new_empty(num_parts, num_heads, head_dim, dtype=torch.float32)
    part_lse = event_query.new_empty(num_parts, num_heads, dtype=torch.float32)
    eo, so = event_query.new_empty(event_query.shape), summary_query.new_empty(summary_query.shape)
    elsep, slsep = (each.new_empty(each.shape[:2], dtype=torch.float32) for each in (eo, so))
    if not num_rows:
        return eo, so, elsep, slsep
    window, visible = layout.window_chunks, layout.max_visible_chunks
    with torch.cuda.device(event_query.device if event_query.is_cuda else -1):
        append_kernel[(len(where) * num_kv_heads, splits)](
            event_query.contiguous(), summary_query.contiguous(), *_pools(cache.events), *_pools(cache.summaries),
            cache.events.table, cache.summaries.table,
            part, part_lse, _counts(layout, len(where) * num_kv_heads), eo, so, elsep, slsep, where,
            head_dim**-0.5 * LOG2E, FOREVER if window is None else window, visible or 0,
            len(event_query), num_rows, cache.events.table.shape[1], max(1, cache.summaries.table.shape[1]),
            H=num_heads, G=group, D=head_dim, K=layout.chunk_size, M=layout.summaries_per_chunk,
            CAPPED=visible is not None and window is not None, EVENT_PAGE=cache.events.page_size,
            SUMMARY_PAGE=cache.summaries.page_size, SPLITS=splits, QUERIES=queries,
            ROWS=max(16, triton.next_power_of_2(queries * group)), BLOCK_N=BLOCK_N,
            PRECISION="ieee" if event_query.dtype is torch.float32 else "tf32", num_warps=4, num_stages=STAGES,
        )  # fmt: skip
    return eo, so, elsep, slsep


def _splits(programs: int) -> int:
    """Return into how many parts, a power of two, the keys are split so that the device is full."""
    return min(MOST_SPLITS, max(1, triton.next_power_of_2(PROGRAMS // max(1, programs) + 1) // 2))


def _counts(layout: ChunkLayout, programs: int) -> Tensor:
    """Return int32 [programs], 0 between launches: how many splits of the same rows have finished."""
    name = f"append counts {programs}"
    if name not in layout.plans:
        layout.plans[name] = torch.zeros(programs, dtype=torch.int32, device=layout.device)
    return layout.plans[name]


def _pools(pages: Pages) -> tuple[Any, Any]:
    return pages.key, pages.value


def queries_a_tile(num_heads: int, num_kv_heads: int) -> int:
    """Return how many queries of a user a program takes."""
    return max(1, 16 * num_kv_heads // num_heads)


def plan_name(queries: int) -> str:
    """Return the name by which a layout keeps its tiles."""
    return f"append tiles {queries}"


def tile_rows(layout: ChunkLayout, queries: int) -> list[tuple[int, ...]]:
    """Return a row a tile: user, first event or slot, whether its queries are summaries, N, key_start, number of
    summaries, and what to add to an event or slot number for its row. Of zeros: a tile without queries.
    """
    m = layout.summaries_per_chunk
    found: list[tuple[int, ...]] = []
    shifts = users_table(layout).tolist()
    for user, span in enumerate(layout.spans):
        num_slots, event_shift, slot_shift = shifts[user][3], shifts[user][4], shifts[user][6]
        n, key_start = span.num_events, span.key_start
        events = range(span.query_start, n, queries)
        slots = range(span.first_query_chunk * m, num_slots, queries)
        found += [(user, first, 0, n, key_start, num_slots, event_shift) for first in events]
        found += [(user, first, 1, n, key_start, num_slots, slot_shift) for first in slots]
    return found


def _tiles(layout: ChunkLayout, queries: int) -> Tensor:
    """Return `tile_rows`, int32 [tiles, 7], on the device."""
    name = plan_name(queries)
    if name not in layout.plans:
        rows = torch.tensor(tile_rows(layout, queries), dtype=torch.int32).reshape(-1, FIELDS.value)
        layout.plans[name] = rows.to(layout.device, non_blocking=True)
    return layout.plans[name]
