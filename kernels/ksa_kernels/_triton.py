"""Helpers that several Triton kernels share. Scores are in base 2 (scaled by log2(e) D**-0.5), row by row.

A *range* is cut in three: tiles at its lower and its upper edge, where some rows see less than others and a mask is
needed, and whole tiles between, where none is. No tile is visited that no row sees.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1.0e30)
"""Score of a key that a row does not see."""
LOWEST = tl.constexpr(-1.0e20)
"""A row's maximum before it has met a key: far above HIDDEN times any scale, so that hidden keys weigh exactly 0."""


@triton.jit
def cut_range(first, low_last, high_first, stop, TILE: tl.constexpr):
    """Cut [first, stop) into (num_low, num_whole, high_start, num_high) tiles.

    Every row sees all of [low_last, high_first); low tiles start at `first`, whole ones follow, then high ones.
    """
    num_low = tl.cdiv(tl.maximum(tl.minimum(low_last, stop) - first, 0), TILE)
    whole_start = first + num_low * TILE
    num_whole = tl.maximum(high_first - whole_start, 0) // TILE
    high_start = whole_start + num_whole * TILE
    num_high = tl.cdiv(tl.maximum(stop - high_start, 0), TILE)
    return num_low, num_whole, high_start, num_high


@triton.jit
def first_seen(chunk, window, key_start, K: tl.constexpr):
    """First event that an event of `chunk` sees."""
    return tl.maximum((chunk - window) * K, key_start)


@triton.jit
def old_stop(chunk, window, M: tl.constexpr):
    """One past the last summary that an event of `chunk` sees."""
    return tl.maximum(chunk - window, 0) * M


@triton.jit
def old_start(chunk, window, visible, M: tl.constexpr, CAPPED: tl.constexpr):
    """First summary that an event of `chunk` sees."""
    result = chunk * 0
    if CAPPED:
        result = tl.maximum(chunk - window - visible, 0) * M
    return result


@triton.jit
def load_rows(pointer, stride, count, ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Load [ROWS, D]; rows from `count` on are zeros where MASKED."""
    rows = tl.arange(0, ROWS)
    pointers = pointer + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=rows[:, None] < count, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def hide(scores, at, low, high, COLUMNS: tl.constexpr):
    """Replace scores of columns outside [low, high) by HIDDEN; low and high by row, the first column is `at`."""
    columns = tl.arange(0, COLUMNS)[None, :]  # constants: the bounds are shifted instead, one a row
    return tl.where((columns >= (low - at)[:, None]) & (columns < (high - at)[:, None]), scores, HIDDEN)


@triton.jit
def softmax_step(scores, scale, value, acc, top, total, PRECISION: tl.constexpr):
    """Add one tile of keys, with scores before scaling, to a running softmax."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(scores * scale - new_top[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def steady_softmax_step(scores, scale, value, acc, top, total, PRECISION: tl.constexpr):
    """Add one tile of keys to a running softmax whose maximum stays: nothing is rescaled, weights may exceed 1."""
    weights = tl.exp2(scores * scale - top[:, None])
    total += tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, total
