"""The same in Triton: scores live in registers, tile by tile.

    log_z[t] = log sum_i exp(u_t v_i + b_i)
    d u_t = g_t sum_i w_ti v_i,   d v_i = sum_t g_t w_ti u_t,   w_ti = exp(u_t v_i + b_i - log_z[t])

`forward_kernel`: a program takes BLOCK_M users and one of SPLITS parts of the items. `gradient_kernel` serves both
gradients: a program takes BLOCK_M rows (users, or items) and goes over a part of the others. Parts are summed outside,
in order: no atomics. Not tuned yet: it has run in the interpreter and been compiled for sm_80, 90 and 100 only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HIDDEN = tl.constexpr(-1.0e30)
LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = 64
PROGRAMS = 264
"""Programs that fill an H100: two a multiprocessor."""


@triton.jit
def _load(pointer, first, count, dim, ROWS: tl.constexpr, D: tl.constexpr):
    """Load rows first..first+ROWS-1 of [count, dim], zeros beyond."""
    rows, columns = first + tl.arange(0, ROWS), tl.arange(0, D)
    mask = (rows < count)[:, None] & (columns < dim)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * dim + columns[None, :], mask=mask, other=0.0)


@triton.jit
def forward_kernel(
    users_ptr, items_ptr, bias_ptr, part_ptr, num_users, num_items, dim, items_a_split,
    BIASED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    users = _load(users_ptr, first, num_users, dim, BLOCK_M, D)
    top = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.minimum((split + 1) * items_a_split, num_items)
    for at in range(split * items_a_split, stop, BLOCK_N):
        items = _load(items_ptr, at, stop, dim, BLOCK_N, D)
        scores = tl.dot(users, tl.trans(items), input_precision=PRECISION)
        columns = at + tl.arange(0, BLOCK_N)
        if BIASED:
            scores += tl.load(bias_ptr + columns, mask=columns < stop, other=0.0).to(tl.float32)[None, :]
        scores = tl.where((columns < stop)[None, :], scores * LOG2E, HIDDEN)
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(part_ptr + split * num_users + rows, (top + tl.log2(total)) / LOG2E, mask=rows < num_users)


@triton.jit
def gradient_kernel(
    rows_ptr, columns_ptr, bias_ptr, log_z_ptr, grad_ptr, part_ptr, num_rows, num_columns, dim, columns_a_split,
    BIASED: tl.constexpr, ROWS_ARE_USERS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    own = _load(rows_ptr, first, num_rows, dim, BLOCK_M, D)
    row = first + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    stop = tl.minimum((split + 1) * columns_a_split, num_columns)
    for at in range(split * columns_a_split, stop, BLOCK_N):
        others = _load(columns_ptr, at, stop, dim, BLOCK_N, D)
        scores = tl.dot(own, tl.trans(others), input_precision=PRECISION)
        column = at + tl.arange(0, BLOCK_N)
        if ROWS_ARE_USERS:
            user, user_exists, item, item_exists = row, row < num_rows, column, column < stop
        else:
            user, user_exists, item, item_exists = column, column < stop, row, row < num_rows
        log_z = tl.load(log_z_ptr + user, mask=user_exists, other=0.0)
        grad = tl.load(grad_ptr + user, mask=user_exists, other=0.0)
        bias = tl.zeros_like(item).to(tl.float32)
        if BIASED:
            bias = tl.load(bias_ptr + item, mask=item_exists, other=0.0).to(tl.float32)
        if ROWS_ARE_USERS:
            weights = tl.exp2((scores + bias[None, :] - log_z[:, None]) * LOG2E) * grad[:, None]
        else:
            weights = tl.exp2((scores + bias[:, None] - log_z[None, :]) * LOG2E) * grad[None, :]
        weights = tl.where((row < num_rows)[:, None] & (column < stop)[None, :], weights, 0.0)
        acc = tl.dot(weights.to(others.dtype), others, acc, input_precision=PRECISION)
    columns_d = tl.arange(0, D)
    mask = (row < num_rows)[:, None] & (columns_d < dim)[None, :]
    out = part_ptr + (split * num_rows + row).to(tl.int64)[:, None] * dim + columns_d[None, :]
    tl.store(out, acc, mask=mask)


def log_z(users: Tensor, items: Tensor, log_popularity: Tensor | None) -> Tensor:
    """Return log sum_i exp(users[t] . items[i] + log_popularity[i]), [T]."""
    return _LogZ.apply(users.contiguous(), items.contiguous(), log_popularity)  # pyright: ignore[reportReturnType]


class _LogZ(torch.autograd.Function):
    """log z [T] from (users, items, log_popularity)."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, log_popularity: Tensor | None) -> Tensor:
        splits, size = _splits(len(users), len(items))
        part = users.new_empty(splits, len(users), dtype=torch.float32)
        if len(users):
            with _on(users):
                forward_kernel[(triton.cdiv(len(users), BLOCK), splits)](
                    users, items, log_popularity, part, len(users), len(items), users.shape[1], size,
                    BIASED=log_popularity is not None, **_constants(users),
                )  # fmt: skip
        total = part.logsumexp(0)
        ctx.save_for_backward(users, items, log_popularity, total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        users, items, log_popularity, total = ctx.saved_tensors
        shared = (log_popularity, total, grads[0].float().contiguous())
        return _gradient(users, items, *shared, True), _gradient(items, users, *shared, False), None


def _gradient(
    rows: Tensor, columns: Tensor, bias: Tensor | None, total: Tensor, grad: Tensor, rows_are_users: bool
) -> Tensor:
    splits, size = _splits(len(rows), len(columns))
    part = rows.new_empty(splits, *rows.shape, dtype=torch.float32)
    if len(rows):
        with _on(rows):
            gradient_kernel[(triton.cdiv(len(rows), BLOCK), splits)](
                rows, columns, bias, total, grad, part, len(rows), len(columns), rows.shape[1], size,
                BIASED=bias is not None, ROWS_ARE_USERS=rows_are_users, **_constants(rows),
            )  # fmt: skip
    return part.sum(0).to(rows.dtype)


def _splits(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Return in how many parts programs take the columns, and the columns of a part."""
    wanted = max(1, min(16, PROGRAMS // max(1, triton.cdiv(num_rows, BLOCK))))
    size = triton.cdiv(triton.cdiv(max(num_columns, 1), wanted), BLOCK) * BLOCK
    return triton.cdiv(max(num_columns, 1), size), size


def _constants(rows: Tensor) -> dict[str, Any]:
    exact = rows.dtype is torch.float32
    return {
        "D": max(16, triton.next_power_of_2(rows.shape[1])),
        "BLOCK_M": BLOCK,
        "BLOCK_N": BLOCK,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 4,
        "num_stages": 1 if exact else 2,
    }


def _on(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
