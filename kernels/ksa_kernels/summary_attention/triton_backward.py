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

from ksa_kernels._triton import (
    USER_FIELDS,
    cut_range,
    first_seen,
    load_rows,
    old_start,
    old_stop,
)

FIELDS = tl.constexpr(USER_FIELDS)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dq_step(q, d_out, k, v, seen, lse2, delta, acc, scale, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Add one tile of keys to dq."""
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse2[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    d_scores = weights * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def queries_kernel(
    eq_ptr, ek_ptr, ev_ptr, sq_ptr, sk_ptr, sv_ptr,
    eo_ptr, so_ptr, else_ptr, slse_ptr, edo_ptr, sdo_ptr,
    edelta_ptr, sdelta_ptr, edq_ptr, sdq_ptr,
    users_ptr, tiles_ptr,
    scale, window, visible, num_event_rows, num_summary_rows,
    eq_row, eq_head, ek_row, ek_head, ev_row, ev_head,
    sq_row, sq_head, sk_row, sk_head, sv_row, sv_head,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    user = tl.load(tiles_ptr + 2 * tile)
    start = tl.load(tiles_ptr + 2 * tile + 1)
    fields = users_ptr + user.to(tl.int64) * FIELDS
    n = tl.load(fields).to(tl.int32)
    query_start = tl.load(fields + 1).to(tl.int32)
    key_start = tl.load(fields + 2).to(tl.int32)
    eq_shift = tl.load(fields + 4)
    sq_shift = tl.load(fields + 6)
    ek_base = ek_ptr + tl.load(fields + 5) * ek_row + (head // G) * ek_head
    ev_base = ev_ptr + tl.load(fields + 5) * ev_row + (head // G) * ev_head
    sk_base = sk_ptr + tl.load(fields + 7) * sk_row + (head // G) * sk_head
    sv_base = sv_ptr + tl.load(fields + 7) * sv_row + (head // G) * sv_head

    # --- event queries: the same ranges as in the forward kernel
    rows = start + tl.arange(0, BLOCK_M)
    exists = (rows >= query_start) & (rows < n)
    last = tl.minimum(start + BLOCK_M, n) - 1
    chunk, chunk_first, chunk_last = rows // K, start // K, last // K
    low_event = first_seen(chunk, window, key_start, K)
    low_old = old_start(chunk, window, visible, M, CAPPED)
    high_old = old_stop(chunk, window, M)
    event_first = first_seen(chunk_first, window, key_start, K)
    event_low, event_whole, event_high_start, event_high = cut_range(
        event_first, first_seen(chunk_last, window, key_start, K), start, start, BLOCK_N
    )
    old_first = old_start(chunk_first, window, visible, M, CAPPED)
    old_end = old_stop(chunk_last, window, M)
    old_low, old_whole, old_high_start, old_high = cut_range(
        old_first, old_start(chunk_last, window, visible, M, CAPPED), old_stop(chunk_first, window, M), old_end, BLOCK_N
    )

    offsets_d = tl.arange(0, D)
    q_rows = eq_ptr + (eq_shift + start) * eq_row + head * eq_head
    q = tl.load(q_rows + tl.arange(0, BLOCK_M)[:, None] * eq_row + offsets_d[None, :], mask=exists[:, None], other=0.0)
    out_rows = eq_shift + rows
    out_at = (out_rows[:, None] * H + head) * D + offsets_d[None, :]
    d_out = tl.load(edo_ptr + out_at, mask=exists[:, None], other=0.0)
    out = tl.load(eo_ptr + out_at, mask=exists[:, None], other=0.0)
    lse_at = head.to(tl.int64) * num_event_rows + out_rows
    # delta arrives as minus the log-sum-exp's gradient
    delta = tl.load(edelta_ptr + lse_at, mask=exists, other=0.0)
    delta += tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(edelta_ptr + lse_at, delta, mask=exists)
    lse2 = tl.load(else_ptr + lse_at, mask=exists, other=0.0) * LOG2E
    acc = tl.zeros([BLOCK_M, D], tl.float32)

    if FUSED:
        slot_first = chunk_first * M
        slot_stop = tl.minimum((start + BLOCK_M) // K, n // K) * M
        slots = slot_first + tl.arange(0, BLOCK_S)
        here = slots < slot_stop
        slot_count = slot_stop - slot_first
        sq_rows = sq_ptr + (sq_shift + slot_first) * sq_row + head * sq_head
        slot_q = load_rows(sq_rows, sq_row, slot_count, BLOCK_S, D, True)
        slot_k = load_rows(sk_base + tl.cast(slot_first, tl.int64) * sk_row, sk_row, slot_count, BLOCK_S, D, True)
        slot_v = load_rows(sv_base + tl.cast(slot_first, tl.int64) * sv_row, sv_row, slot_count, BLOCK_S, D, True)
        slot_rows = sq_shift + slots
        slot_place = (slot_rows[:, None] * H + head) * D + offsets_d[None, :]
        slot_d_out = tl.load(sdo_ptr + slot_place, mask=here[:, None], other=0.0)
        slot_out = tl.load(so_ptr + slot_place, mask=here[:, None], other=0.0)
        slot_lse_at = head.to(tl.int64) * num_summary_rows + slot_rows
        slot_delta = tl.load(sdelta_ptr + slot_lse_at, mask=here, other=0.0)
        slot_delta += tl.sum(slot_out.to(tl.float32) * slot_d_out.to(tl.float32), 1)
        tl.store(sdelta_ptr + slot_lse_at, slot_delta, mask=here)
        slot_lse2 = tl.load(slse_ptr + slot_lse_at, mask=here, other=0.0) * LOG2E

    for d in tl.static_range(0, BLOCK_M // BLOCK_N):
        diagonal = start + d * BLOCK_N
        count = last + 1 - diagonal
        k = load_rows(ek_base + tl.cast(diagonal, tl.int64) * ek_row, ek_row, count, BLOCK_N, D, True)
        v = load_rows(ev_base + tl.cast(diagonal, tl.int64) * ev_row, ev_row, count, BLOCK_N, D, True)
        columns = (diagonal + tl.arange(0, BLOCK_N))[None, :]
        seen = (columns >= low_event[:, None]) & (columns <= rows[:, None])
        acc = _dq_step(q, d_out, k, v, seen, lse2, delta, acc, scale, PRECISION, True)
        if FUSED:
            slot_acc = tl.zeros([BLOCK_S, D], tl.float32)
            slot_seen = (columns // K) == (slots // M)[:, None]
            slot_acc = _dq_step(
                slot_q, slot_d_out, k, v, slot_seen, slot_lse2, slot_delta, slot_acc, scale, PRECISION, True
            )
            slot_seen = ((slots // M)[None, :] == (slots // M)[:, None]) & (slots[None, :] <= slots[:, None])
            slot_acc = _dq_step(
                slot_q, slot_d_out, slot_k, slot_v, slot_seen, slot_lse2, slot_delta, slot_acc, scale, PRECISION, True
            )
            slot_acc *= scale / LOG2E
            tl.store(sdq_ptr + slot_place, slot_acc.to(sdq_ptr.dtype.element_ty), mask=here[:, None])

    num_event_edges = event_high + event_low
    for t in range(num_event_edges + old_low + old_high):
        is_old = t >= num_event_edges
        at_event = tl.where(t < event_high, event_high_start + t * BLOCK_N, event_first + (t - event_high) * BLOCK_N)
        u = t - num_event_edges
        at_old = tl.where(u < old_low, old_first + u * BLOCK_N, old_high_start + (u - old_low) * BLOCK_N)
        at = tl.where(is_old, at_old, at_event)
        count = tl.where(is_old, old_end, start) - at
        k_row, v_row = tl.where(is_old, sk_row, ek_row), tl.where(is_old, sv_row, ev_row)
        k = load_rows(tl.where(is_old, sk_base, ek_base) + at.to(tl.int64) * k_row, k_row, count, BLOCK_N, D, True)
        v = load_rows(tl.where(is_old, sv_base, ev_base) + at.to(tl.int64) * v_row, v_row, count, BLOCK_N, D, True)
        columns = (at + tl.arange(0, BLOCK_N))[None, :]
        low = tl.where(is_old, low_old, low_event)[:, None]
        high = tl.where(is_old, high_old, start)[:, None]
        seen = (columns >= low) & (columns < high)
        acc = _dq_step(q, d_out, k, v, seen, lse2, delta, acc, scale, PRECISION, True)

    whole_first = event_first + event_low * BLOCK_N
    old_whole_first = old_first + old_low * BLOCK_N
    for t in range(event_whole + old_whole):
        is_old = t >= event_whole
        at = tl.where(is_old, old_whole_first + (t - event_whole) * BLOCK_N, whole_first + t * BLOCK_N)
        k_row, v_row = tl.where(is_old, sk_row, ek_row), tl.where(is_old, sv_row, ev_row)
        k = load_rows(tl.where(is_old, sk_base, ek_base) + at.to(tl.int64) * k_row, k_row, 0, BLOCK_N, D, False)
        v = load_rows(tl.where(is_old, sv_base, ev_base) + at.to(tl.int64) * v_row, v_row, 0, BLOCK_N, D, False)
        acc = _dq_step(q, d_out, k, v, exists, lse2, delta, acc, scale, PRECISION, False)

    acc *= scale / LOG2E
    tl.store(edq_ptr + out_at, acc.to(edq_ptr.dtype.element_ty), mask=exists[:, None])

    # --- summary queries of the chunks whose last event lies in this tile
    if M > 0 and not FUSED:
        slot_stop = tl.minimum((start + BLOCK_M) // K, n // K) * M
        for slot_first in range(chunk_first * M, slot_stop, BLOCK_S):
            slots = slot_first + tl.arange(0, BLOCK_S)
            here = slots < slot_stop
            block_chunk = slots // M
            chunk_a = slot_first // M
            chunk_b = (tl.minimum(slot_first + BLOCK_S, slot_stop) - 1) // M + 1
            sq_rows = sq_ptr + (sq_shift + slot_first) * sq_row + head * sq_head
            slot_q = load_rows(sq_rows, sq_row, slot_stop - slot_first, BLOCK_S, D, True)
            slot_rows = sq_shift + slots
            slot_place = (slot_rows[:, None] * H + head) * D + offsets_d[None, :]
            slot_d_out = tl.load(sdo_ptr + slot_place, mask=here[:, None], other=0.0)
            slot_out = tl.load(so_ptr + slot_place, mask=here[:, None], other=0.0)
            slot_lse_at = head.to(tl.int64) * num_summary_rows + slot_rows
            slot_delta = tl.load(sdelta_ptr + slot_lse_at, mask=here, other=0.0)
            slot_delta += tl.sum(slot_out.to(tl.float32) * slot_d_out.to(tl.float32), 1)
            tl.store(sdelta_ptr + slot_lse_at, slot_delta, mask=here)
            slot_lse2 = tl.load(slse_ptr + slot_lse_at, mask=here, other=0.0) * LOG2E
            slot_acc = tl.zeros([BLOCK_S, D], tl.float32)
            for slot_at in range(chunk_a * K, chunk_b * K, BLOCK_N):
                slot_count = chunk_b * K - slot_at
                slot_k = load_rows(ek_base + tl.cast(slot_at, tl.int64) * ek_row, ek_row, slot_count, BLOCK_N, D, True)
                slot_v = load_rows(ev_base + tl.cast(slot_at, tl.int64) * ev_row, ev_row, slot_count, BLOCK_N, D, True)
                slot_seen = ((slot_at + tl.arange(0, BLOCK_N)) // K)[None, :] == block_chunk[:, None]
                slot_acc = _dq_step(
                    slot_q,
                    slot_d_out,
                    slot_k,
                    slot_v,
                    slot_seen,
                    slot_lse2,
                    slot_delta,
                    slot_acc,
                    scale,
                    PRECISION,
                    True,
                )
            for slot_at in range(chunk_a * M, chunk_b * M, BLOCK_S):
                slot_count = chunk_b * M - slot_at
                slot_k = load_rows(sk_base + tl.cast(slot_at, tl.int64) * sk_row, sk_row, slot_count, BLOCK_S, D, True)
                slot_v = load_rows(sv_base + tl.cast(slot_at, tl.int64) * sv_row, sv_row, slot_count, BLOCK_S, D, True)
                slot_columns = slot_at + tl.arange(0, BLOCK_S)
                slot_seen = (slot_columns[None, :] // M == block_chunk[:, None]) & (
                    slot_columns[None, :] <= slots[:, None]
                )
                slot_acc = _dq_step(
                    slot_q,
                    slot_d_out,
                    slot_k,
                    slot_v,
                    slot_seen,
                    slot_lse2,
                    slot_delta,
                    slot_acc,
                    scale,
                    PRECISION,
                    True,
                )
            slot_acc *= scale / LOG2E
            tl.store(sdq_ptr + slot_place, slot_acc.to(sdq_ptr.dtype.element_ty), mask=here[:, None])


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


@triton.jit
def columns_kernel(
    k_ptr, v_ptr, dk_ptr, dv_ptr,
    eq_ptr, edo_ptr, else_ptr, edelta_ptr,
    sq_ptr, sdo_ptr, slse_ptr, sdelta_ptr,
    users_ptr, tiles_ptr,
    scale, window, visible, num_event_rows, num_summary_rows,
    k_row, k_head, v_row, v_head, eq_row, eq_head, sq_row, sq_head,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, CAPPED: tl.constexpr,
    SUMMARIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_kv_heads: tl.constexpr = H // G
    kv_head = tl.program_id(0) % num_kv_heads
    tile = tl.program_id(0) // num_kv_heads
    user = tl.load(tiles_ptr + 2 * tile)
    start = tl.load(tiles_ptr + 2 * tile + 1)
    fields = users_ptr + user.to(tl.int64) * FIELDS
    n = tl.load(fields).to(tl.int32)
    query_start = tl.load(fields + 1).to(tl.int32)
    chunk_asking = tl.load(fields + 3).to(tl.int32)
    eq_shift = tl.load(fields + 4)
    sq_shift = tl.load(fields + 6)
    columns = start + tl.arange(0, BLOCK_N)

    # --- which events see each of these keys: low <= i < high
    if SUMMARIES:
        key_shift = tl.load(fields + 7)
        num_columns = n // K * M
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
        key_shift = tl.load(fields + 5)
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
    slot_stop = tl.minimum(chunk_last + 1, n // K) * M

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
