"""Root-mean-square normalisation (arXiv 1910.07467): torch's own on a GPU, fewer operators on a CPU."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """Return x / sqrt(mean(x ** 2) + eps) * weight, the mean over the last dimension.

    Args:
        x: [..., D], float32 or float64.
        weight: [D], or of a shape that broadcasts with x and ends in D.
        eps: added to the mean square.
    """
    if x.device.type != "cpu":
        if weight.dim() == 1:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x, weight.shape[-1:], None, eps) * weight
    # On a CPU torch's own is made of a dozen operators, once a third of the time of appending an event. These are four,
    # by |x| / sqrt(D) = sqrt(mean(x ** 2)), and they train no slower.
    none, added = _constants(x.shape[-1], eps, x.dtype)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcdiv(none, x * weight, torch.hypot(length, added), value=math.sqrt(x.shape[-1]))


@cache
def _constants(dim: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return 0 and sqrt(D eps) as tensors: an operator takes those faster than numbers."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype), torch.tensor(math.sqrt(dim * eps), dtype=dtype)
