"""The same in Triton: scores live in registers, tile by tile.

    log_z[t] = log sum_i exp(u_t v_i + b_i)
    d u_t = g_t sum_i w_ti v_i,   d v_i = sum_t g_t w_ti u_t,   d b_i = sum_t g_t w_ti,
    w_ti = exp(u_t v_i + b_i - log_z[t])

`forward_kernel`: a program takes BLOCK_M users and one of SPLITS parts of the items. `gradient_kernel` serves both
gradients: a program takes BLOCK_M rows (users, or items) and goes over a part of the others. Parts are summed outside,
in order: no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ksa_kernels._triton import HIDDEN, LOG2E, LOWEST

PROGRAMS = 264
"""Programs that fill an H100: two a multiprocessor."""


class Blocks(NamedTuple):
    """Tile of one kernel: rows, columns, warps, stages of loads in flight."""

    m: int
    n: int
    warps: int
    stages: int


# Tuned on an NVIDIA H100 80 GB: 8,192 users, 131,072 items, d = 128.
FORWARD = Blocks(128, 128, 8, 2)
GRADIENT = Blocks(128, 64, 4, 2)
EXACT = Blocks(128, 64, 8, 1)
"""float32."""
WIDE = Blocks(64, 32, 4, 1)
"""More than 128 dimensions."""


@triton.jit
def _load(pointer, first, count, dim, ROWS: tl.constexpr, D: tl.constexpr):
    """Load rows first..first+ROWS-1 of [count, dim], zeros beyond."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D)
    pointers = pointer + tl.cast(first, tl.int64) * dim + rows[:, None] * dim + columns[None, :]
    return tl.load(pointers, mask=(first + rows < count)[:, None] & (columns < dim)[None, :], other=0.0)


@triton.jit
def forward_kernel(
    users_ptr, items_ptr, bias_ptr, part_ptr, num_users, num_items, dim, items_a_split,
    BIASED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    users = _load(users_ptr, first, num_users, dim, BLOCK_M, D)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.minimum((split + 1) * items_a_split, num_items)
    for at in range(split * items_a_split, stop, BLOCK_N):
        items = _load(items_ptr, at, stop, dim, BLOCK_N, D)
        scores = tl.dot(users, tl.trans(items), input_precision=PRECISION)
        columns = at + tl.arange(0, BLOCK_N)
        if BIASED:
            scores += tl.load(bias_ptr + columns, mask=columns < stop, other=0.0).to(tl.float32)[None, :]
        if at + BLOCK_N > stop:
            scores = tl.where((columns < stop)[None, :], scores, HIDDEN)
        new_top = tl.maximum(top, tl.max(scores, 1) * LOG2E)
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores * LOG2E - new_top[:, None]), 1)
        top = new_top
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(part_ptr + split * num_users + rows, (top + tl.log2(total)) / LOG2E, mask=rows < num_users)


@triton.jit
def gradient_kernel(
    rows_ptr, columns_ptr, bias_ptr, log_z_ptr, grad_ptr, part_ptr, bias_part_ptr,
    num_rows, num_columns, dim, columns_a_split,
    BIASED: tl.constexpr, ROWS_ARE_USERS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    own = _load(rows_ptr, first, num_rows, dim, BLOCK_M, D)
    row = first + tl.arange(0, BLOCK_M)
    own_log2 = tl.zeros([BLOCK_M], tl.float32)  # log z of users, bias of items
    if ROWS_ARE_USERS:
        own_log2 = tl.load(log_z_ptr + row, mask=row < num_rows, other=0.0) * LOG2E
    elif BIASED:
        own_log2 = tl.load(bias_ptr + row, mask=row < num_rows, other=0.0).to(tl.float32) * LOG2E
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    bias_acc = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.minimum((split + 1) * columns_a_split, num_columns)
    for at in range(split * columns_a_split, stop, BLOCK_N):
        others = _load(columns_ptr, at, stop, dim, BLOCK_N, D)
        scores = tl.dot(own, tl.trans(others), input_precision=PRECISION)
        column = at + tl.arange(0, BLOCK_N)
        if ROWS_ARE_USERS:
            if BIASED:
                scores += tl.load(bias_ptr + column, mask=column < stop, other=0.0).to(tl.float32)[None, :]
            if at + BLOCK_N > stop:
                scores = tl.where((column < stop)[None, :], scores, HIDDEN)
            weights = tl.exp2(scores * LOG2E - own_log2[:, None])
        else:
            log2 = (tl.load(log_z_ptr + column, mask=column < stop, other=0.0)) * LOG2E
            grad = tl.load(grad_ptr + column, mask=column < stop, other=0.0)  # 0: users beyond add nothing
            weights = tl.exp2(scores * LOG2E + (own_log2[:, None] - log2[None, :])) * grad[None, :]
            if BIASED:
                bias_acc += tl.sum(weights, 1)
        acc = tl.dot(weights.to(others.dtype), others, acc, input_precision=PRECISION)
    if ROWS_ARE_USERS:
        acc *= tl.load(grad_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    columns_d = tl.arange(0, D)
    mask = (row < num_rows)[:, None] & (columns_d < dim)[None, :]
    out = part_ptr + (split * num_rows + row).to(tl.int64)[:, None] * dim + columns_d[None, :]
    tl.store(out, acc, mask=mask)
    if BIASED and not ROWS_ARE_USERS:
        tl.store(bias_part_ptr + split * num_rows + row, bias_acc, mask=row < num_rows)


def log_z(users: Tensor, items: Tensor, log_popularity: Tensor | None) -> Tensor:
    """Return log sum_i exp(users[t] . items[i] + log_popularity[i]), [T]."""
    return _LogZ.apply(users.contiguous(), items.contiguous(), log_popularity)  # pyright: ignore[reportReturnType]


class _LogZ(torch.autograd.Function):
    """log z [T] from (users, items, log_popularity)."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, log_popularity: Tensor | None) -> Tensor:
        blocks = _blocks(users, FORWARD)
        splits, size = _splits(len(users), len(items), blocks)
        part = users.new_empty(splits, len(users), dtype=torch.float32)
        if len(users):
            with _on(users):
                forward_kernel[(triton.cdiv(len(users), blocks.m), splits)](
                    users, items, log_popularity, part, len(users), len(items), users.shape[1], size,
                    BIASED=log_popularity is not None, **_constants(users, blocks),
                )  # fmt: skip
        total = part.logsumexp(0)
        ctx.save_for_backward(users, items, log_popularity, total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        users, items, log_popularity, total = ctx.saved_tensors
        shared = (log_popularity, total, grads[0].float().contiguous())
        d_users, _ = _gradient(users, items, *shared, True)
        return d_users, *_gradient(items, users, *shared, False)


def _gradient(
    rows: Tensor, columns: Tensor, bias: Tensor | None, total: Tensor, grad: Tensor, rows_are_users: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of the rows and, where those are items, of their bias."""
    blocks = _blocks(rows, GRADIENT)
    splits, size = _splits(len(rows), len(columns), blocks)
    part = rows.new_empty(splits, *rows.shape, dtype=torch.float32)
    bias_part = None if bias is None or rows_are_users else rows.new_empty(splits, len(rows), dtype=torch.float32)
    if len(rows):
        with _on(rows):
            gradient_kernel[(triton.cdiv(len(rows), blocks.m), splits)](
                rows, columns, bias, total, grad, part, bias_part, len(rows), len(columns), rows.shape[1], size,
                BIASED=bias is not None, ROWS_ARE_USERS=rows_are_users, **_constants(rows, blocks),
            )  # fmt: skip
    d_bias = None if bias_part is None or bias is None else bias_part.sum(0).to(bias.dtype)
    return part.sum(0).to(rows.dtype), d_bias


def _blocks(rows: Tensor, tuned: Blocks) -> Blocks:
    """Return a kernel's tile: the tuned one where it fits into shared memory."""
    if rows.shape[1] > 128:
        return WIDE
    return EXACT if rows.dtype is torch.float32 else tuned


def _splits(num_rows: int, num_columns: int, blocks: Blocks) -> tuple[int, int]:
    """Return in how many parts programs take the columns, and the columns of a part."""
    wanted = max(1, min(16, PROGRAMS // max(1, triton.cdiv(num_rows, blocks.m))))
    size = triton.cdiv(triton.cdiv(max(num_columns, 1), wanted), blocks.n) * blocks.n
    return triton.cdiv(max(num_columns, 1), size), size


def _constants(rows: Tensor, blocks: Blocks) -> dict[str, Any]:
    return {
        "D": max(16, triton.next_power_of_2(rows.shape[1])),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        # float32 in three products of tf32 parts: as exact as float32, on the matrix units
        "PRECISION": "tf32x3" if rows.dtype is torch.float32 else "tf32",
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _on(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
