"""Blocks of users and items in plain PyTorch: a running log-sum-exp forward, probabilities again backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

USERS_AT_ONCE, ITEMS_AT_ONCE = 1024, 8192
"""Rows and columns of the largest block of scores: 32 MiB in float32."""


def log_z(users: Tensor, items: Tensor, log_popularity: Tensor | None) -> Tensor:
    """Return log sum_i exp(users[t] . items[i] + log_popularity[i]), [T]."""
    offset = items.new_zeros(len(items)) if log_popularity is None else log_popularity
    return _LogZ.apply(users, items, offset)  # pyright: ignore[reportReturnType]


class _LogZ(torch.autograd.Function):
    """log z [T] from (users, items, log_popularity)."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, log_popularity: Tensor) -> Tensor:
        total = users.new_full((len(users),), -torch.inf, dtype=_wide(users))
        for rows in _blocks(len(users), USERS_AT_ONCE):
            for columns in _blocks(len(items), ITEMS_AT_ONCE):
                scores = _scores(users[rows], items[columns], log_popularity[columns])
                total[rows] = torch.logaddexp(total[rows], scores.logsumexp(1))
        ctx.save_for_backward(users, items, log_popularity, total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        users, items, log_popularity, total = ctx.saved_tensors
        inputs = (users, items, log_popularity)
        d_users, d_items, d_offset = (torch.zeros_like(each, dtype=total.dtype) for each in inputs)
        for rows in _blocks(len(users), USERS_AT_ONCE):
            for columns in _blocks(len(items), ITEMS_AT_ONCE):
                weights = _scores(users[rows], items[columns], log_popularity[columns])
                weights.sub_(total[rows, None]).exp_().mul_(grads[0][rows, None])
                d_users[rows] += weights @ items[columns].to(total.dtype)
                d_items[columns] += weights.T @ users[rows].to(total.dtype)
                d_offset[columns] += weights.sum(0)
        return tuple(grad.to(each.dtype) for grad, each in zip((d_users, d_items, d_offset), inputs, strict=True))


def _scores(users: Tensor, items: Tensor, log_popularity: Tensor) -> Tensor:
    dtype = _wide(users)
    return torch.addmm(log_popularity.to(dtype), users.to(dtype), items.to(dtype).T)


def _wide(users: Tensor) -> torch.dtype:
    return torch.float64 if users.dtype is torch.float64 else torch.float32


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]
