"""Blocks of items in plain PyTorch: a running log-sum-exp forward, probabilities again backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 21
"""Scores worked on together."""


def log_z(users: Tensor, items: Tensor, log_popularity: Tensor | None) -> Tensor:
    """Return log sum_i exp(users[t] . items[i] + log_popularity[i]), [T]."""
    return _LogZ.apply(users, items, log_popularity)  # pyright: ignore[reportReturnType]


class _LogZ(torch.autograd.Function):
    """log z [T] from (users, items, log_popularity)."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, log_popularity: Tensor | None) -> Tensor:
        dtype = torch.float64 if users.dtype is torch.float64 else torch.float32
        total = users.new_full((len(users),), -torch.inf, dtype=dtype)
        for block in _blocks(len(users), len(items)):
            total = torch.logaddexp(total, _scores(users, items, log_popularity, block, dtype).logsumexp(1))
        ctx.save_for_backward(users, items, log_popularity, total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        users, items, log_popularity, total = ctx.saved_tensors
        d_users, d_items = torch.zeros_like(users, dtype=total.dtype), torch.empty_like(items)
        weighted = users.to(total.dtype) * grads[0][:, None]
        for block in _blocks(len(users), len(items)):
            weights = _scores(users, items, log_popularity, block, total.dtype).sub_(total[:, None]).exp_()
            d_users.addmm_(weights, items[block].to(total.dtype))
            d_items[block] = (weights.T @ weighted).to(items.dtype)
        return (d_users * grads[0][:, None]).to(users.dtype), d_items, None


def _scores(users: Tensor, items: Tensor, log_popularity: Tensor | None, block: slice, dtype: torch.dtype) -> Tensor:
    scores = users.to(dtype) @ items[block].to(dtype).T
    return scores if log_popularity is None else scores.add_(log_popularity[block].to(dtype))


def _blocks(num_users: int, num_items: int) -> list[slice]:
    size = max(1, SCORES_AT_ONCE // max(num_users, 1))
    return [slice(start, min(start + size, num_items)) for start in range(0, num_items, size)]
