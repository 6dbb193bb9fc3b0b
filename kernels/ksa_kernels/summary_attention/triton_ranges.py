"""What the kernels that take tiles of queries share: which keys their rows see, and which tiles those lie in.

A tile of queries sees two ranges of keys, the events of its window and the old summaries. Each is cut in three
(`cut_range`); a kernel goes over the edges of both in one masked loop, and over the whole tiles of both in another.
"""

import triton
import triton.language as tl

from ksa_kernels._triton import cut_range, first_seen, load_rows, old_start, old_stop

FIELDS = tl.constexpr(9)
"""Entries of a row of the tile map; `triton_tiles.tiles` writes them."""


@triton.jit
def load_fields(tiles_ptr, tile):
    """Return a tile's start, its user's N, query_start, key_start and number of summaries, and what to add to an event
    or slot number for its row among event queries, event keys, summary queries and summary keys.
    """
    at = tiles_ptr + tile * FIELDS
    start, n = tl.load(at), tl.load(at + 1)
    query_start, key_start, num_slots = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    eq_shift, ek_shift = tl.load(at + 5).to(tl.int64), tl.load(at + 6).to(tl.int64)
    sq_shift, sk_shift = tl.load(at + 7).to(tl.int64), tl.load(at + 8).to(tl.int64)
    return start, n, query_start, key_start, num_slots, eq_shift, ek_shift, sq_shift, sk_shift


@triton.jit
def query_ranges(
    start, n, key_start, window, visible,
    K: tl.constexpr, M: tl.constexpr, CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return what each row of a tile of event queries sees, and the tiles of keys.

    Rows see events [low_event, row] and summaries [low_old, high_old). `events` and `old` are the two ranges cut:
    (first, one past the last, num_low, num_whole, high_start, num_high).
    """
    rows = start + tl.arange(0, BLOCK_M)
    last = tl.minimum(start + BLOCK_M, n) - 1
    chunk, chunk_first, chunk_last = rows // K, start // K, last // K
    low_event = first_seen(chunk, window, key_start, K)
    low_old = old_start(chunk, window, visible, M, CAPPED)
    high_old = old_stop(chunk, window, M)
    first = first_seen(chunk_first, window, key_start, K)
    low, whole, high_start, high = cut_range(
        first, first_seen(chunk_last, window, key_start, K), start, last + 1, BLOCK_N
    )
    events = (first, last + 1, low, whole, high_start, high)
    first = old_start(chunk_first, window, visible, M, CAPPED)
    stop = old_stop(chunk_last, window, M)
    low, whole, high_start, high = cut_range(
        first, old_start(chunk_last, window, visible, M, CAPPED), old_stop(chunk_first, window, M), stop, BLOCK_N
    )
    old = (first, stop, low, whole, high_start, high)
    return rows, low_event, low_old, high_old, events, old


@triton.jit
def summary_range(start, query_start, num_slots, K: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the first summary query of a tile of event queries, and one past its last: of chunks that close in it.

    Chunks that closed before `query_start` do not ask, though a tile shorter than a chunk may begin in one.
    """
    first = start
    if K > BLOCK_M:
        first = tl.maximum(start, query_start)
    return first // K * M, tl.minimum((start + BLOCK_M) // K * M, num_slots)


@triton.jit
def edge_tile(t, events, old, BLOCK_N: tl.constexpr):
    """Return whether the t-th tile at an edge holds summaries, where it starts, and one past its range's last key.

    The diagonal comes first.
    """
    first, stop, low, _whole, high_start, high = events
    old_first, old_end, old_low, _old_whole, old_high_start, _old_high = old
    u = t - low - high
    is_old = u >= 0
    at_event = tl.where(t < high, high_start + t * BLOCK_N, first + (t - high) * BLOCK_N)
    at_old = tl.where(u < old_low, old_first + u * BLOCK_N, old_high_start + (u - old_low) * BLOCK_N)
    return is_old, tl.where(is_old, at_old, at_event), tl.where(is_old, old_end, stop)


@triton.jit
def whole_tile(t, events, old, BLOCK_N: tl.constexpr):
    """Return whether the t-th whole tile holds summaries, and where it starts."""
    first, _stop, low, whole, _high_start, _high = events
    old_first, _old_end, old_low, _old_whole, _old_high_start, _old_high = old
    is_old = t >= whole
    return is_old, tl.where(is_old, old_first + (old_low + t - whole) * BLOCK_N, first + (low + t) * BLOCK_N)


@triton.jit
def num_edge_tiles(events, old):
    """Return how many tiles lie at edges."""
    return events[2] + events[5] + old[2] + old[5]


@triton.jit
def num_whole_tiles(events, old):
    """Return how many tiles all rows see whole."""
    return events[3] + old[3]


@triton.jit
def load_keys(
    is_old, at, count, ek_base, ev_base, sk_base, sv_base, ek_row, ev_row, sk_row, sv_row,
    ROWS: tl.constexpr, D: tl.constexpr, SAME_STRIDES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load a tile of keys and values, of events or of summaries; SAME_STRIDES says that all row strides agree."""
    k_row, v_row = ek_row, ek_row
    if not SAME_STRIDES:
        k_row, v_row = tl.where(is_old, sk_row, ek_row), tl.where(is_old, sv_row, ev_row)
    k = load_rows(tl.where(is_old, sk_base, ek_base) + at.to(tl.int64) * k_row, k_row, count, ROWS, D, MASKED)
    v = load_rows(tl.where(is_old, sv_base, ev_base) + at.to(tl.int64) * v_row, v_row, count, ROWS, D, MASKED)
    return k, v
