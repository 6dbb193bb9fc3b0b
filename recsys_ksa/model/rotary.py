"""Rotary positions by event index (RoFormer, arXiv 2104.09864), angles from float64.

float32 angles are off by 4e-3 rad at position 10^5.
"""

from functools import cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BASE = 10_000.0

Integers = TypeVar("Integers", Tensor, NDArray[np.int64])

Rotary = tuple[Tensor, Tensor]
"""(cos, signed sin), each [T, 1, D]: the halves of a head's dimensions share their angles, the first's sine carries the
minus. `ksa_kernels.norm_rotary` turns heads by them."""


def rotary_table(position: Tensor, head_dim: int, dtype: torch.dtype) -> Rotary:
    """Return the table of each position's angles, int64 [T] -> two [T, 1, head_dim] in `dtype`."""
    frequency, sign = _frequency(head_dim, position.device)
    angle = position[:, None, None] * frequency
    return angle.cos().to(dtype), (angle.sin() * sign).to(dtype)


@cache
def _frequency(head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return BASE ** (-2 i / head_dim) twice over, and the sign of each half's sine; float64 [head_dim] each."""
    with torch.inference_mode(False):
        half = BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
        one = torch.ones_like(half)
        return torch.cat((half, half)), torch.cat((-one, one))


def summary_position(chunk: Integers, slot: Integers, chunk_size: int, summaries_per_chunk: int) -> Integers:
    """Return the event position that summary `slot` of `chunk` carries: the slots end evenly in the chunk."""
    return chunk * chunk_size + ((slot + 1) * chunk_size // summaries_per_chunk - 1).clip(min=0)
