"""Whole-tensor PyTorch operations."""

import torch
from torch import Tensor

from ksa_kernels.rms_norm import rms_norm


def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return [T, P, H, D]."""
    head = x[:, 0] if x.dtype in (torch.float32, torch.float64) else x[:, 0].float()
    normed = rms_norm(head, weight.to(head.dtype), eps)
    turned = torch.addcmul(normed * cos, normed.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
    return turned[:, None] if x.shape[1] == 1 else torch.cat((turned[:, None], x[:, 1:]), 1)
