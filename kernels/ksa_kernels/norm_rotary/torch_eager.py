"""Whole-tensor PyTorch operations."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return [T, P, H, D]."""
    head = x[:, 0] if x.dtype is torch.float64 else x[:, 0].float()
    normed = F.rms_norm(head, weight.shape, weight.to(head.dtype), eps)
    turned = torch.addcmul(normed * cos, normed.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
    return turned[:, None] if x.shape[1] == 1 else torch.cat((turned[:, None], x[:, 1:]), 1)
