"""Forward pass in Triton.

    out[i] = sum_j 2**(s[i, j] - lse2[i]) v[j],  s = q k log2(e) / sqrt(D),  over the keys j that query i sees

One program takes BLOCK_M events of one user and one head, in two phases:

    event queries      old summaries [ low | whole ... | high ]    window events [ low | whole ... | high | diagonal ]
    summary queries    of the chunks that close in this tile: their events, their slots

The diagonal tile comes first; where it holds all events of its chunks (FUSED), the summary queries take it too, while
it is there. Tiles at edges run in one masked loop, whole tiles in one without masks; each loop goes over events and
summaries alike by choosing a base pointer, so its loads stay in flight across both.

Letters: K chunk_size, M summaries_per_chunk, D head dim. Log-sum-exps are stored by head, [H, rows], natural log.
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
    softmax_step,
)

FIELDS = tl.constexpr(USER_FIELDS)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def _summaries_of_tile(
    q, own_k, own_v, k, v, slots, start, slot_stop, sq_shift, head, num_summary_rows,
    so_ptr, slse_ptr, scale,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from the summary queries of a tile's closed chunks to its events k, v and to their own slots."""
    acc = tl.zeros([BLOCK_S, D], tl.float32)
    top = tl.full([BLOCK_S], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    column_chunk = (start + tl.arange(0, BLOCK_N)) // K
    scores = tl.where(column_chunk[None, :] == (slots // M)[:, None], scores, HIDDEN)
    acc, top, total = softmax_step(scores, scale, v, acc, top, total, PRECISION)
    scores = tl.dot(q, tl.trans(own_k), input_precision=PRECISION)
    seen = ((slots // M)[None, :] == (slots // M)[:, None]) & (slots[None, :] <= slots[:, None])
    scores = tl.where(seen, scores, HIDDEN)
    acc, top, total = softmax_step(scores, scale, own_v, acc, top, total, PRECISION)
    here = slots < slot_stop
    out_rows = sq_shift + slots
    tl.store(
        so_ptr + (out_rows[:, None] * H + head) * D + tl.arange(0, D)[None, :],
        (acc / total[:, None]).to(so_ptr.dtype.element_ty),
        mask=here[:, None],
    )
    lse_base = slse_ptr + head.to(tl.int64) * num_summary_rows
    tl.store(lse_base + out_rows, (top + tl.log2(total)) * LN2, mask=here)


@triton.jit
def forward_kernel(
    eq_ptr, ek_ptr, ev_ptr, sq_ptr, sk_ptr, sv_ptr,
    eo_ptr, so_ptr, else_ptr, slse_ptr,
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

    # --- event queries: where each row's two ranges begin and end
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
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    if FUSED:
        slot_first = chunk_first * M
        slot_stop = tl.minimum((start + BLOCK_M) // K, n // K) * M
        slots = slot_first + tl.arange(0, BLOCK_S)
        sq_rows = sq_ptr + (sq_shift + slot_first) * sq_row + head * sq_head
        sk_rows = sk_base + tl.cast(slot_first, tl.int64) * sk_row
        sv_rows = sv_base + tl.cast(slot_first, tl.int64) * sv_row
        slot_q = load_rows(sq_rows, sq_row, slot_stop - slot_first, BLOCK_S, D, True)
        slot_k = load_rows(sk_rows, sk_row, slot_stop - slot_first, BLOCK_S, D, True)
        slot_v = load_rows(sv_rows, sv_row, slot_stop - slot_first, BLOCK_S, D, True)

    # --- the diagonal first, so that each row has seen a key (itself) before it meets a hidden one
    for d in tl.static_range(0, BLOCK_M // BLOCK_N):
        diagonal = start + d * BLOCK_N
        count = last + 1 - diagonal
        k = load_rows(ek_base + tl.cast(diagonal, tl.int64) * ek_row, ek_row, count, BLOCK_N, D, True)
        v = load_rows(ev_base + tl.cast(diagonal, tl.int64) * ev_row, ev_row, count, BLOCK_N, D, True)
        columns = (diagonal + tl.arange(0, BLOCK_N))[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where((columns >= low_event[:, None]) & (columns <= rows[:, None]), scores, HIDDEN)
        acc, top, total = softmax_step(scores, scale, v, acc, top, total, PRECISION)
        if FUSED:
            _summaries_of_tile(
                slot_q, slot_k, slot_v, k, v, slots, diagonal, slot_stop, sq_shift, head, num_summary_rows,
                so_ptr, slse_ptr, scale, H, D, K, M, BLOCK_N, BLOCK_S, PRECISION,
            )  # fmt: skip

    # --- tiles at edges
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
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        columns = (at + tl.arange(0, BLOCK_N))[None, :]
        low = tl.where(is_old, low_old, low_event)[:, None]
        high = tl.where(is_old, high_old, start)[:, None]
        scores = tl.where((columns >= low) & (columns < high), scores, HIDDEN)
        acc, top, total = softmax_step(scores, scale, v, acc, top, total, PRECISION)

    # --- tiles that every row sees whole
    whole_first = event_first + event_low * BLOCK_N
    old_whole_first = old_first + old_low * BLOCK_N
    for t in range(event_whole + old_whole):
        is_old = t >= event_whole
        at = tl.where(is_old, old_whole_first + (t - event_whole) * BLOCK_N, whole_first + t * BLOCK_N)
        k_row, v_row = tl.where(is_old, sk_row, ek_row), tl.where(is_old, sv_row, ev_row)
        k = load_rows(tl.where(is_old, sk_base, ek_base) + at.to(tl.int64) * k_row, k_row, 0, BLOCK_N, D, False)
        v = load_rows(tl.where(is_old, sv_base, ev_base) + at.to(tl.int64) * v_row, v_row, 0, BLOCK_N, D, False)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        acc, top, total = softmax_step(scores, scale, v, acc, top, total, PRECISION)

    out_rows = eq_shift + rows
    out = acc / total[:, None]
    tl.store(
        eo_ptr + (out_rows[:, None] * H + head) * D + offsets_d[None, :],
        out.to(eo_ptr.dtype.element_ty),
        mask=exists[:, None],
    )
    lse_base = else_ptr + head.to(tl.int64) * num_event_rows
    tl.store(lse_base + out_rows, (top + tl.log2(total)) * LN2, mask=exists)

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
            slot_acc = tl.zeros([BLOCK_S, D], tl.float32)
            slot_top = tl.full([BLOCK_S], HIDDEN, tl.float32)
            slot_total = tl.zeros([BLOCK_S], tl.float32)
            for slot_at in range(chunk_a * K, chunk_b * K, BLOCK_N):
                slot_count = chunk_b * K - slot_at
                slot_k = load_rows(ek_base + tl.cast(slot_at, tl.int64) * ek_row, ek_row, slot_count, BLOCK_N, D, True)
                slot_v = load_rows(ev_base + tl.cast(slot_at, tl.int64) * ev_row, ev_row, slot_count, BLOCK_N, D, True)
                slot_scores = tl.dot(slot_q, tl.trans(slot_k), input_precision=PRECISION)
                column_chunk = (slot_at + tl.arange(0, BLOCK_N)) // K
                slot_scores = tl.where(column_chunk[None, :] == block_chunk[:, None], slot_scores, HIDDEN)
                slot_acc, slot_top, slot_total = softmax_step(
                    slot_scores, scale, slot_v, slot_acc, slot_top, slot_total, PRECISION
                )
            for slot_at in range(chunk_a * M, chunk_b * M, BLOCK_S):
                slot_count = chunk_b * M - slot_at
                slot_k = load_rows(sk_base + tl.cast(slot_at, tl.int64) * sk_row, sk_row, slot_count, BLOCK_S, D, True)
                slot_v = load_rows(sv_base + tl.cast(slot_at, tl.int64) * sv_row, sv_row, slot_count, BLOCK_S, D, True)
                slot_scores = tl.dot(slot_q, tl.trans(slot_k), input_precision=PRECISION)
                slot_columns = slot_at + tl.arange(0, BLOCK_S)
                slot_seen = (slot_columns[None, :] // M == block_chunk[:, None]) & (
                    slot_columns[None, :] <= slots[:, None]
                )
                slot_scores = tl.where(slot_seen, slot_scores, HIDDEN)
                slot_acc, slot_top, slot_total = softmax_step(
                    slot_scores, scale, slot_v, slot_acc, slot_top, slot_total, PRECISION
                )
            slot_out_rows = sq_shift + slots
            tl.store(
                so_ptr + (slot_out_rows[:, None] * H + head) * D + offsets_d[None, :],
                (slot_acc / slot_total[:, None]).to(so_ptr.dtype.element_ty),
                mask=here[:, None],
            )
            slot_lse_base = slse_ptr + head.to(tl.int64) * num_summary_rows
            tl.store(slot_lse_base + slot_out_rows, (slot_top + tl.log2(slot_total)) * LN2, mask=here)
