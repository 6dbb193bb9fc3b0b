"""Rotary positions by event index (RoFormer, arXiv 2104.09864), angles from float64.

float32 angles are off by 4e-3 rad at position 10^5.
"""

import torch
from torch import Tensor

BASE = 10_000.0

Rotary = tuple[Tensor, Tensor]
"""(cos, sin), each [T, 1, D / 2]."""


def rotary_table(position: Tensor, head_dim: int, dtype: torch.dtype) -> Rotary:
    """Return cos and sin of each position's angles, int64 [T] -> two [T, 1, head_dim / 2] in `dtype`."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position.device) / head_dim
    angle = position.to(torch.float64)[:, None] * BASE**-exponent
    return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)


def rotate(x_THD: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (first half, second half) of the head's dimensions by its angle. [T, H, D] -> same."""
    cos, sin = rotary
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def summary_position(chunk: Tensor, slot: Tensor, chunk_size: int, summaries_per_chunk: int) -> Tensor:
    """Return the event position that summary `slot` of `chunk` carries: the slots end evenly in the chunk."""
    return chunk * chunk_size + torch.clamp((slot + 1) * chunk_size // summaries_per_chunk - 1, min=0)
