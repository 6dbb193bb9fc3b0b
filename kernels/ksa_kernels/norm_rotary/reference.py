"""The formula, half by half."""

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return [T, P, H, D]."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    head = x[:, 0].to(dtype)
    normed = head / (head.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(dtype)
    (first, second), (cos_1, cos_2), (sin_1, sin_2) = (each.to(dtype).chunk(2, -1) for each in (normed, cos, sin))
    turned = torch.cat((first * cos_1 + second * sin_1, second * cos_2 + first * sin_2), -1)
    return torch.cat((turned.to(x.dtype)[:, None], x[:, 1:]), 1)
