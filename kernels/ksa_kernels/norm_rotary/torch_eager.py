"""Whole-tensor PyTorch operations."""

import torch
from torch import Tensor

from ksa_kernels.rms_norm import rms_norm


def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return [T, P, H, D]."""
    return _with_first(x, _turned(x[:, 0], weight, cos, sin, eps))


def forward_pair(
    x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `forward` of both, [T, P, H, D] and [T, Q, J, D], the heads side by side in one pass."""
    counts = x.shape[2], y.shape[2]
    heads = torch.cat((x[:, 0], y[:, 0]), 1)
    weight = torch.cat((x_weight.expand(counts[0], -1), y_weight.expand(counts[1], -1)))
    first, second = _turned(heads, weight, cos, sin, eps).split_with_sizes(counts, 1)
    return _with_first(x, first), _with_first(y, second)


def _turned(head: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    dtype = head.dtype
    if dtype not in (torch.float32, torch.float64):
        head = head.float()
    normed = rms_norm(head, weight if weight.dtype is head.dtype else weight.to(head.dtype), eps)
    turned = torch.addcmul(normed * cos, normed.roll(head.shape[-1] // 2, -1), sin)
    return turned if turned.dtype is dtype else turned.to(dtype)


def _with_first(x: Tensor, first: Tensor) -> Tensor:
    """Return x with its first part replaced."""
    return first[:, None] if x.shape[1] == 1 else torch.cat((first[:, None], x[:, 1:]), 1)
