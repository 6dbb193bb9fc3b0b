"""Backward pass in Triton: two passes over the pairs, no atomics, so results are the same every time.

    p = 2**(s - lse2),  ds = p (dO v - delta),  delta = sum_d dO out - d lse
    dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D),   dv = p^T dO

`queries_kernel` walks like the forward kernel (one program: BLOCK_M events and the summaries they close) and also
writes delta. `columns_kernel` takes BLOCK_N keys of one user and one key head and goes over the rows that see them:

    event keys         rows [ diagonal | whole ... | last chunks of the window ], summary queries of their own chunks
    summary keys       rows from the end of the window on [ low | whole ... | high ], later slots of their own chunk

Letters: K chunk_size, M summaries_per_chunk, D head dim, G query heads a key head.
"""

import triton
import triton.language as tl

from ksa_kernels._triton import LOG2E, cut_range, load_rows
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
def _dq_step(q, d_out, k, v, seen, lse2, delta, acc, scale, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Add one tile of keys to dq."""
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse2[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    d_scores = weights * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def _finished_delta(out, d_out, delta_at, exists):
    """Add sum_d dO out to what `delta_at` holds, minus the log-sum-exp's gradient; store and return it."""
    delta = tl.load(delta_at, mask=exists, other=0.0)
    delta += tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_at, delta, mask=exists)
    return delta


@triton.jit
def _own_step(
    q, d_out, k_rows, v_rows, k_row, v_row, count, seen, lse2, delta, acc, scale,
    ROWS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys of the summary queries' own chunks."""
    k = load_rows(k_rows, k_row, count, ROWS, D, True)
    v = load_rows(v_rows, v_row, count, ROWS, D, True)
    return _dq_step(q, d_out, k, v, seen, lse2, delta, acc, scale, PRECISION, True)


@triton.jit
def _summary_queries(
    slot_first, slot_stop, sq_base, ek_base, ev_base, sk_base, sv_base,
    so_base, sdo_base, sdq_base, slse_base, sdelta_base,
    sq_row, ek_row, ev_row, sk_row, sv_row, so_row, scale,
    D: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq and delta of a block of summary queries; as in the forward kernel."""
    slots = slot_first + tl.arange(0, BLOCK_S)
    here, chunk = slots < slot_stop, slots // M
    chunk_first = slot_first // M
    chunk_stop = (tl.minimum(slot_first + BLOCK_S, slot_stop) - 1) // M + 1
    q_rows = sq_base + tl.cast(slot_first, tl.int64) * sq_row
    q = load_rows(q_rows, sq_row, slot_stop - slot_first, BLOCK_S, D, True)
    place = slots.to(tl.int64)[:, None] * so_row + tl.arange(0, D)[None, :]
    d_out = tl.load(sdo_base + place, mask=here[:, None], other=0.0)
    out = tl.load(so_base + place, mask=here[:, None], other=0.0)
    delta = _finished_delta(out, d_out, sdelta_base + slots, here)
    lse2 = tl.load(slse_base + slots, mask=here, other=0.0) * LOG2E
    acc = tl.zeros([BLOCK_S, D], tl.float32)
    if FUSED:
        at = chunk_first * K
        acc = _own_step(
            q, d_out, ek_base + tl.cast(at, tl.int64) * ek_row, ev_base + tl.cast(at, tl.int64) * ev_row,
            ek_row, ev_row, chunk_stop * K - at, ((at + tl.arange(0, BLOCK_M)) // K)[None, :] == chunk[:, None],
            lse2, delta, acc, scale, BLOCK_M, D, PRECISION,
        )  # fmt: skip
        acc = _own_step(
            q, d_out, sk_base + tl.cast(slot_first, tl.int64) * sk_row,
            sv_base + tl.cast(slot_first, tl.int64) * sv_row,
            sk_row, sv_row, slot_stop - slot_first,
            (chunk[None, :] == chunk[:, None]) & (slots[None, :] <= slots[:, None]),
            lse2, delta, acc, scale, BLOCK_S, D, PRECISION,
        )  # fmt: skip
    else:
        for at in range(chunk_first * K, chunk_stop * K, BLOCK_N):
            acc = _own_step(
                q, d_out, ek_base + tl.cast(at, tl.int64) * ek_row, ev_base + tl.cast(at, tl.int64) * ev_row,
                ek_row, ev_row, chunk_stop * K - at, ((at + tl.arange(0, BLOCK_N)) // K)[None, :] == chunk[:, None],
                lse2, delta, acc, scale, BLOCK_N, D, PRECISION,
            )  # fmt: skip
        for at in range(chunk_first * M, chunk_stop * M, BLOCK_S):
            columns = at + tl.arange(0, BLOCK_S)
            acc = _own_step(
                q, d_out, sk_base + tl.cast(at, tl.int64) * sk_row, sv_base + tl.cast(at, tl.int64) * sv_row,
                sk_row, sv_row, chunk_stop * M - at,
                ((columns // M)[None, :] == chunk[:, None]) & (columns[None, :] <= slots[:, None]),
                lse2, delta, acc, scale, BLOCK_S, D, PRECISION,
            )  # fmt: skip
    acc *= scale / LOG2E
    tl.store(sdq_base + place, acc.to(sdq_base.dtype.element_ty), mask=here[:, None])


@triton.jit(do_not_specialize=["window", "visible", "num_event_rows", "num_summary_rows"])
def queries_kernel(
    eq_ptr, ek_ptr, ev_ptr, sq_ptr, sk_ptr, sv_ptr,
    eo_ptr, so_ptr, else_ptr, slse_ptr, edo_ptr, sdo_ptr,
    edelta_ptr, sdelta_ptr, edq_ptr, sdq_ptr,
    tiles_ptr,
    scale, window, visible, num_event_rows, num_summary_rows,
    eq_row, eq_head, ek_row, ek_head, ev_row, ev_head,
    sq_row, sq_head, sk_row, sk_head, sv_row, sv_head,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, CAPPED: tl.constexpr,
    SAME_STRIDES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    FUSED: tl.constexpr, PRECISION: tl.constexpr,
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

    # --- event queries
    rows, low_event, low_old, high_old, events, old = query_ranges(
        start, n, key_start, window, visible, K, M, CAPPED, BLOCK_M, BLOCK_N
    )
    exists = (rows >= query_start) & (rows < n)
    offsets_d = tl.arange(0, D)
    q_rows = eq_base + tl.cast(start, tl.int64) * eq_row
    q = tl.load(q_rows + tl.arange(0, BLOCK_M)[:, None] * eq_row + offsets_d[None, :], mask=exists[:, None], other=0.0)
    out_rows = eq_shift + rows
    place = (out_rows[:, None] * H + head) * D + offsets_d[None, :]
    d_out = tl.load(edo_ptr + place, mask=exists[:, None], other=0.0)
    out = tl.load(eo_ptr + place, mask=exists[:, None], other=0.0)
    lse_at = head.to(tl.int64) * num_event_rows + out_rows
    delta = _finished_delta(out, d_out, edelta_ptr + lse_at, exists)
    lse2 = tl.load(else_ptr + lse_at, mask=exists, other=0.0) * LOG2E
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for t in range(num_edge_tiles(events, old)):
        is_old, at, stop = edge_tile(t, events, old, BLOCK_N)
        k, v = load_keys(
            is_old, at, stop - at, ek_base, ev_base, sk_base, sv_base, ek_row, ev_row, sk_row, sv_row,
            BLOCK_N, D, SAME_STRIDES, True,
        )  # fmt: skip
        columns = (at + tl.arange(0, BLOCK_N))[None, :]
        low, high = tl.where(is_old, low_old, low_event)[:, None], tl.where(is_old, high_old, rows + 1)[:, None]
        seen = (columns >= low) & (columns < high)
        acc = _dq_step(q, d_out, k, v, seen, lse2, delta, acc, scale, PRECISION, True)
    for t in range(num_whole_tiles(events, old)):
        is_old, at = whole_tile(t, events, old, BLOCK_N)
        k, v = load_keys(
            is_old, at, 0, ek_base, ev_base, sk_base, sv_base, ek_row, ev_row, sk_row, sv_row,
            BLOCK_N, D, SAME_STRIDES, False,
        )  # fmt: skip
        acc = _dq_step(q, d_out, k, v, exists, lse2, delta, acc, scale, PRECISION, False)
    acc *= scale / LOG2E
    tl.store(edq_ptr + place, acc.to(edq_ptr.dtype.element_ty), mask=exists[:, None])

    # --- summary queries of the chunks whose last event lies in this tile
    if M > 0:
        slot_start, slot_stop = summary_range(start, query_start, num_slots, K, M, BLOCK_M)
        sq_base = sq_ptr + sq_shift * sq_row + head * sq_head
        shift = (sq_shift * H + head) * D
        lse_shift = head.to(tl.int64) * num_summary_rows + sq_shift
        if FUSED:
            if slot_start < slot_stop:
                _summary_queries(
                    slot_start, slot_stop, sq_base, ek_base, ev_base, sk_base, sv_base,
                    so_ptr + shift, sdo_ptr + shift, sdq_ptr + shift, slse_ptr + lse_shift, sdelta_ptr + lse_shift,
                    sq_row, ek_row, ev_row, sk_row, sv_row, H * D, scale,
                    D, K, M, BLOCK_M, BLOCK_N, BLOCK_S, FUSED, PRECISION,
                )  # fmt: skip
        else:
            for slot_first in range(slot_start, slot_stop, BLOCK_S):
                _summary_queries(
                    slot_first, slot_stop, sq_base, ek_base, ev_base, sk_base, sv_base,
                    so_ptr + shift, sdo_ptr + shift, sdq_ptr + shift, slse_ptr + lse_shift, sdelta_ptr + lse_shift,
                    sq_row, ek_row, ev_row, sk_row, sv_row, H * D, scale,
                    D, K, M, BLOCK_M, BLOCK_N, BLOCK_S, FUSED, PRECISION,
                )  # fmt: skip


@triton.jit
def _dkv_step(
    k, v, q, d_out, lse2, delta, seen, dk, dv, scale, PRECISION: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Add one tile of queries to dk and dv; everything is transposed: [keys, queries]."""
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse2[None, :])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    dv = tl.dot(weights.to(v.dtype), d_out, dv, input_precision=PRECISION)
    d_scores = weights * (tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(d_scores.to(k.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _own_summaries_step(
    k, v, dk, dv, sq_ptr, sdo_ptr, slse_ptr, sdelta_ptr, at, slot_stop, sq_shift, head, chunk, columns,
    sq_row, sq_head, num_summary_rows, scale,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, SUMMARIES: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a block of summary queries to the gradients of keys of their own chunks."""
    slots = at + tl.arange(0, BLOCK_S)
    here = slots < slot_stop
    rows = sq_shift + slots
    offsets_d = tl.arange(0, D)[None, :]
    q = tl.load(sq_ptr + rows[:, None] * sq_row + head * sq_head + offsets_d, mask=here[:, None], other=0.0)
    d_out = tl.load(sdo_ptr + (rows[:, None] * H + head) * D + offsets_d, mask=here[:, None], other=0.0)
    lse_at = head.to(tl.int64) * num_summary_rows + rows
    lse2 = tl.load(slse_ptr + lse_at, mask=here, other=0.0) * LOG2E
    delta = tl.load(sdelta_ptr + lse_at, mask=here, other=0.0)
    seen = ((slots // M)[None, :] == chunk[:, None]) & here[None, :]
    if SUMMARIES:
        seen = seen & (slots[None, :] >= columns[:, None])
    return _dkv_step(k, v, q, d_out, lse2, delta, seen, dk, dv, scale, PRECISION, True)


@triton.jit(do_not_specialize=["window", "visible", "num_event_rows", "num_summary_rows"])
def columns_kernel(
    k_ptr, v_ptr, dk_ptr, dv_ptr,
    eq_ptr, edo_ptr, else_ptr, edelta_ptr,
    sq_ptr, sdo_ptr, slse_ptr, sdelta_ptr,
    tiles_ptr,
    scale, window, visible, num_event_rows, num_summary_rows,
    k_row, k_head, v_row, v_head, eq_row, eq_head, sq_row, sq_head,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, CAPPED: tl.constexpr,
    SUMMARIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_kv_heads: tl.constexpr = H // G
    kv_head = tl.program_id(0) % num_kv_heads
    tile = tl.program_id(0) // num_kv_heads
    start, n, query_start, _key_start, num_slots, eq_shift, ek_shift, sq_shift, sk_shift = load_fields(tiles_ptr, tile)
    chunk_asking = query_start // K
    columns = start + tl.arange(0, BLOCK_N)

    # --- which events see each of these keys: low <= i < high
    if SUMMARIES:
        key_shift = sk_shift
        num_columns = num_slots
        last = tl.minimum(start + BLOCK_N, num_columns) - 1
        chunk, chunk_first, chunk_last = columns // M, start // M, last // M
        low, low_first, low_last = (
            (chunk + window + 1) * K,
            (chunk_first + window + 1) * K,
            (chunk_last + window + 1) * K,
        )
        high, high_first, high_last = tl.full([BLOCK_N], 1, tl.int32) * n, n, n
        if CAPPED:
            high = tl.minimum(low + visible * K, n)
            high_first = tl.minimum(low_first + visible * K, n)
            high_last = tl.minimum(low_last + visible * K, n)
    else:
        key_shift = ek_shift
        num_columns = n
        last = tl.minimum(start + BLOCK_N, n) - 1
        chunk, chunk_first, chunk_last = columns // K, start // K, last // K
        low, low_first, low_last = columns, start, last
        high = tl.minimum((chunk + window + 1) * K, n)
        high_first = tl.minimum((chunk_first + window + 1) * K, n)
        high_last = tl.minimum((chunk_last + window + 1) * K, n)
    row_first = tl.maximum(low_first, query_start)
    num_low, _num_whole, row_high_start, num_high = cut_range(row_first, low_last, high_first, high_last, BLOCK_M)

    k = load_rows(k_ptr + (key_shift + start) * k_row + kv_head * k_head, k_row, num_columns - start, BLOCK_N, D, True)
    v = load_rows(v_ptr + (key_shift + start) * v_row + kv_head * v_head, v_row, num_columns - start, BLOCK_N, D, True)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    offsets_m = tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, D)
    slot_start = tl.maximum(chunk_first, chunk_asking) * M
    slot_stop = tl.minimum((chunk_last + 1) * M, num_slots)

    for g in range(G):
        head = kv_head * G + g
        q_base = eq_ptr + eq_shift * eq_row + head * eq_head
        do_base = edo_ptr + (eq_shift * H + head) * D
        lse_base = else_ptr + head.to(tl.int64) * num_event_rows + eq_shift
        delta_base = edelta_ptr + head.to(tl.int64) * num_event_rows + eq_shift

        # the chunks' own summary queries, of those that ask, where they are one block
        if FUSED:
            dk, dv = _own_summaries_step(
                k, v, dk, dv, sq_ptr, sdo_ptr, slse_ptr, sdelta_ptr, slot_start, slot_stop, sq_shift, head, chunk,
                columns, sq_row, sq_head, num_summary_rows, scale, H, D, M, SUMMARIES, BLOCK_S, PRECISION,
            )  # fmt: skip

        # tiles of rows at edges
        for t in range(num_low + num_high):
            at = tl.where(t < num_low, row_first + t * BLOCK_M, row_high_start + (t - num_low) * BLOCK_M)
            here = at + offsets_m < high_last
            q = load_rows(q_base + at.to(tl.int64) * eq_row, eq_row, high_last - at, BLOCK_M, D, True)
            d_out = load_rows(do_base + at.to(tl.int64) * (H * D), H * D, high_last - at, BLOCK_M, D, True)
            lse2 = tl.load(lse_base + at + offsets_m, mask=here, other=0.0) * LOG2E
            delta = tl.load(delta_base + at + offsets_m, mask=here, other=0.0)
            rows = (at + offsets_m)[None, :]
            seen = (rows >= low[:, None]) & (rows < high[:, None])
            dk, dv = _dkv_step(k, v, q, d_out, lse2, delta, seen, dk, dv, scale, PRECISION, True)

        # tiles of rows that see all these keys
        whole_first = row_first + num_low * BLOCK_M
        for at in range(whole_first, row_high_start, BLOCK_M):
            q = load_rows(q_base + tl.cast(at, tl.int64) * eq_row, eq_row, 0, BLOCK_M, D, False)
            d_out = load_rows(do_base + tl.cast(at, tl.int64) * (H * D), H * D, 0, BLOCK_M, D, False)
            lse2 = tl.load(lse_base + at + offsets_m) * LOG2E
            delta = tl.load(delta_base + at + offsets_m)
            dk, dv = _dkv_step(k, v, q, d_out, lse2, delta, columns, dk, dv, scale, PRECISION, False)

        # the chunks' own summary queries, where more than one block
        if M > 0 and not FUSED:
            for at in range(slot_start, slot_stop, BLOCK_S):
                dk, dv = _own_summaries_step(
                    k, v, dk, dv, sq_ptr, sdo_ptr, slse_ptr, sdelta_ptr, at, slot_stop, sq_shift, head, chunk, columns,
                    sq_row, sq_head, num_summary_rows, scale, H, D, M, SUMMARIES, BLOCK_S, PRECISION,
                )  # fmt: skip

    dk *= scale / LOG2E
    stored = (columns < num_columns)[:, None]
    out_at = ((key_shift + columns)[:, None] * num_kv_heads + kv_head) * D + offsets_d[None, :]
    tl.store(dk_ptr + out_at, dk.to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + out_at, dv.to(dv_ptr.dtype.element_ty), mask=stored)
