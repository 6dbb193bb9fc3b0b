"""Forward pass in Triton.

    out[i] = sum_j 2**(s[i, j] - lse2[i]) v[j],  s = q k log2(e) / sqrt(D),  over the keys j that query i sees

One program takes BLOCK_M events of one user and one head, in two phases:

    event queries      window events [ low | whole ... | high ]    old summaries [ low | whole ... | high ]
    summary queries    of the chunks that close in this tile: their events, their slots

Tiles at edges (the diagonal is one) run in one masked loop, whole tiles in one without masks; each loop goes over
events and summaries alike by choosing a base pointer, so its loads stay in flight across both. Nothing big lies in
shared memory beside the loops' own tiles: so four programs with three tiles in flight each fit a multiprocessor.

STEADY, for wide heads and for attention without a window: whole tiles keep the maximum that the edges found, where each
event met at least itself. Weights may then exceed 1, which floating point does not mind, and nothing is rescaled. A
program whose sums grow beyond reason (an old summary's score is 60 powers of two above the edges') does its events
again with a running maximum.

Letters: K chunk_size, M summaries_per_chunk, D head dim. Log-sum-exps are stored by head, [H, rows], natural log.
"""

import triton
import triton.language as tl

from ksa_kernels._triton import HIDDEN, LN2, LOWEST, hide, load_rows, softmax_step, steady_softmax_step
from ksa_kernels.summary_attention.triton_ranges import (
    edge_tile,
    load_fields,
    load_keys,
    num_edge_tiles,
    num_whole_tiles,
    query_ranges,
    summary_range,
    whole_tile,
)


@triton.jit
def _own_step(
    q, k_rows, v_rows, k_row, v_row, count, seen, acc, top, total, scale,
    ROWS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys of the summary queries' own chunks."""
    k = load_rows(k_rows, k_row, count, ROWS, D, True)
    v = load_rows(v_rows, v_row, count, ROWS, D, True)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return softmax_step(tl.where(seen, scores, HIDDEN), scale, v, acc, top, total, PRECISION)


@triton.jit
def _summary_queries(
    slot_first, slot_stop, sq_base, ek_base, ev_base, sk_base, sv_base, so_base, slse_base,
    sq_row, ek_row, ev_row, sk_row, sv_row, so_row, scale,
    D: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from a block of summary queries to the events of their chunks and to the slots up to their own.

    FUSED: one tile of BLOCK_M holds all these events, one of BLOCK_S all these slots.
    """
    slots = slot_first + tl.arange(0, BLOCK_S)
    chunk = slots // M
    chunk_first = slot_first // M
    chunk_stop = (tl.minimum(slot_first + BLOCK_S, slot_stop) - 1) // M + 1
    q_rows = sq_base + tl.cast(slot_first, tl.int64) * sq_row
    q = load_rows(q_rows, sq_row, slot_stop - slot_first, BLOCK_S, D, True)
    acc = tl.zeros([BLOCK_S, D], tl.float32)
    top = tl.full([BLOCK_S], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    if FUSED:
        at = chunk_first * K
        acc, top, total = _own_step(
            q, ek_base + tl.cast(at, tl.int64) * ek_row, ev_base + tl.cast(at, tl.int64) * ev_row,
            ek_row, ev_row, chunk_stop * K - at, ((at + tl.arange(0, BLOCK_M)) // K)[None, :] == chunk[:, None],
            acc, top, total, scale, BLOCK_M, D, PRECISION,
        )  # fmt: skip
        acc, top, total = _own_step(
            q, sk_base + tl.cast(slot_first, tl.int64) * sk_row,
            sv_base + tl.cast(slot_first, tl.int64) * sv_row,
            sk_row, sv_row, slot_stop - slot_first,
            (chunk[None, :] == chunk[:, None]) & (slots[None, :] <= slots[:, None]),
            acc, top, total, scale, BLOCK_S, D, PRECISION,
        )  # fmt: skip
    else:
        for at in range(chunk_first * K, chunk_stop * K, BLOCK_N):
            acc, top, total = _own_step(
                q, ek_base + tl.cast(at, tl.int64) * ek_row, ev_base + tl.cast(at, tl.int64) * ev_row,
                ek_row, ev_row, chunk_stop * K - at, ((at + tl.arange(0, BLOCK_N)) // K)[None, :] == chunk[:, None],
                acc, top, total, scale, BLOCK_N, D, PRECISION,
            )  # fmt: skip
        for at in range(chunk_first * M, chunk_stop * M, BLOCK_S):
            columns = at + tl.arange(0, BLOCK_S)
            acc, top, total = _own_step(
                q, sk_base + tl.cast(at, tl.int64) * sk_row, sv_base + tl.cast(at, tl.int64) * sv_row,
                sk_row, sv_row, chunk_stop * M - at,
                ((columns // M)[None, :] == chunk[:, None]) & (columns[None, :] <= slots[:, None]),
                acc, top, total, scale, BLOCK_S, D, PRECISION,
            )  # fmt: skip
    here = slots < slot_stop
    out = (acc / total[:, None]).to(so_base.dtype.element_ty)
    tl.store(so_base + slots.to(tl.int64)[:, None] * so_row + tl.arange(0, D)[None, :], out, mask=here[:, None])
    tl.store(slse_base + slots, (top + tl.log2(total)) * LN2, mask=here)


@triton.jit
def _event_queries(
    start, n, query_start, key_start, eq_shift, head,
    eq_base, ek_base, ev_base, sk_base, sv_base, eo_ptr, else_ptr, eq_row, ek_row, ev_row, sk_row, sv_row,
    scale, window, visible, num_event_rows,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, CAPPED: tl.constexpr,
    SAME_STRIDES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEADY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from a tile's events; return the largest sum of weights of any of them.

    STEADY: whole tiles keep the edges' maximum.
    """
    rows, low_event, low_old, high_old, events, old = query_ranges(
        start, n, key_start, window, visible, K, M, CAPPED, BLOCK_M, BLOCK_N
    )
    exists = (rows >= query_start) & (rows < n)
    offsets_d = tl.arange(0, D)
    q_rows = eq_base + tl.cast(start, tl.int64) * eq_row
    q = tl.load(q_rows + tl.arange(0, BLOCK_M)[:, None] * eq_row + offsets_d[None, :], mask=exists[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for t in range(num_edge_tiles(events, old)):
        is_old, at, stop = edge_tile(t, events, old, BLOCK_N)
        k, v = load_keys(
            is_old, at, stop - at, ek_base, ev_base, sk_base, sv_base, ek_row, ev_row, sk_row, sv_row,
            BLOCK_N, D, SAME_STRIDES, True,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        low, high = tl.where(is_old, low_old, low_event), tl.where(is_old, high_old, rows + 1)
        scores = hide(scores, at, low, high, BLOCK_N)
        acc, top, total = softmax_step(scores, scale, v, acc, top, total, PRECISION)
    for t in range(num_whole_tiles(events, old)):
        is_old, at = whole_tile(t, events, old, BLOCK_N)
        k, v = load_keys(
            is_old, at, 0, ek_base, ev_base, sk_base, sv_base, ek_row, ev_row, sk_row, sv_row,
            BLOCK_N, D, SAME_STRIDES, False,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if STEADY:
            acc, total = steady_softmax_step(scores, scale, v, acc, top, total, PRECISION)
        else:
            acc, top, total = softmax_step(scores, scale, v, acc, top, total, PRECISION)
    out_rows = eq_shift + rows
    out = (acc / total[:, None]).to(eo_ptr.dtype.element_ty)
    tl.store(eo_ptr + (out_rows[:, None] * H + head) * D + offsets_d[None, :], out, mask=exists[:, None])
    lse_base = else_ptr + head.to(tl.int64) * num_event_rows
    tl.store(lse_base + out_rows, (top + tl.log2(total)) * LN2, mask=exists)
    return tl.max(tl.where(exists, total, 0.0), 0)


@triton.jit(do_not_specialize=["window", "visible", "num_event_rows", "num_summary_rows"])
def forward_kernel(
    eq_ptr, ek_ptr, ev_ptr, sq_ptr, sk_ptr, sv_ptr,
    eo_ptr, so_ptr, else_ptr, slse_ptr,
    tiles_ptr,
    scale, window, visible, num_event_rows, num_summary_rows,
    eq_row, eq_head, ek_row, ek_head, ev_row, ev_head,
    sq_row, sq_head, sk_row, sk_head, sv_row, sv_head,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, CAPPED: tl.constexpr,
    SAME_STRIDES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    FUSED: tl.constexpr, STEADY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, kv_head = tl.program_id(0) % H, (tl.program_id(0) % H) // G
    start, n, query_start, key_start, num_slots, eq_shift, ek_shift, sq_shift, sk_shift = load_fields(
        tiles_ptr, tl.program_id(0) // H
    )
    eq_base = eq_ptr + eq_shift * eq_row + head * eq_head
    ek_base = ek_ptr + ek_shift * ek_row + kv_head * ek_head
    ev_base = ev_ptr + ek_shift * ev_row + kv_head * ev_head
    sk_base = sk_ptr + sk_shift * sk_row + kv_head * sk_head
    sv_base = sv_ptr + sk_shift * sv_row + kv_head * sv_head
    largest = _event_queries(
        start, n, query_start, key_start, eq_shift, head,
        eq_base, ek_base, ev_base, sk_base, sv_base, eo_ptr, else_ptr, eq_row, ek_row, ev_row, sk_row, sv_row,
        scale, window, visible, num_event_rows,
        H, D, K, M, CAPPED, SAME_STRIDES, BLOCK_M, BLOCK_N, STEADY, PRECISION,
    )  # fmt: skip

    # --- summary queries of the chunks whose last event lies in this tile
    if M > 0:
        slot_start, slot_stop = summary_range(start, query_start, num_slots, K, M, BLOCK_M)
        sq_base = sq_ptr + sq_shift * sq_row + head * sq_head
        so_base = so_ptr + (sq_shift * H + head) * D
        slse_base = slse_ptr + head.to(tl.int64) * num_summary_rows + sq_shift
        if FUSED:
            _summary_queries(
                slot_start, slot_stop, sq_base, ek_base, ev_base, sk_base, sv_base, so_base, slse_base,
                sq_row, ek_row, ev_row, sk_row, sv_row, H * D, scale,
                D, K, M, BLOCK_M, BLOCK_N, BLOCK_S, FUSED, PRECISION,
            )  # fmt: skip
        else:
            for slot_first in range(slot_start, slot_stop, BLOCK_S):
                _summary_queries(
                    slot_first, slot_stop, sq_base, ek_base, ev_base, sk_base, sv_base, so_base, slse_base,
                    sq_row, ek_row, ev_row, sk_row, sv_row, H * D, scale,
                    D, K, M, BLOCK_M, BLOCK_N, BLOCK_S, FUSED, PRECISION,
                )  # fmt: skip

    # --- the events again, where sums in float32 (weights in float16) grew too large to be trusted
    if STEADY:
        limit = 2.0**60
        if ev_ptr.dtype.element_ty == tl.float16:
            limit = 2.0**15
        if largest > limit:
            start, n, query_start, key_start, _num_slots, eq_shift, ek_shift, _sq_shift, sk_shift = load_fields(
                tiles_ptr, tl.program_id(0) // H
            )
            _event_queries(
                start, n, query_start, key_start, eq_shift, head,
                eq_ptr + eq_shift * eq_row + head * eq_head,
                ek_ptr + ek_shift * ek_row + kv_head * ek_head,
                ev_ptr + ek_shift * ev_row + kv_head * ev_head,
                sk_ptr + sk_shift * sk_row + kv_head * sk_head,
                sv_ptr + sk_shift * sv_row + kv_head * sv_head,
                eo_ptr, else_ptr, eq_row, ek_row, ev_row, sk_row, sv_row,
                scale, window, visible, num_event_rows,
                H, D, K, M, CAPPED, SAME_STRIDES, BLOCK_M, BLOCK_N, False, PRECISION,
            )  # fmt: skip
