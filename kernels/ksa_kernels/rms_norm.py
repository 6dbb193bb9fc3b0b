"""Root-mean-square normalisation (arXiv 1910.07467): torch's own on a GPU, fewer operators on a CPU."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """Return x / sqrt(mean(x ** 2) + eps) * weight, the mean over the last dimension.

    Args:
        x: [..., D], float32 or float64.
        weight: [D].
        eps: added to the mean square.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    # On a CPU torch's own is made of a dozen operators, once a third of the time of appending an event. These are six
    # (a number that is no tensor costs more than the operator that takes it), and they train no slower.
    per_dim, added = _constants(x.shape[-1], eps, x.dtype)
    return x * torch.addcmul(added, x.square().sum(-1, keepdim=True), per_dim).rsqrt() * weight


@cache
def _constants(dim: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return torch.tensor(1.0 / dim, dtype=dtype), torch.tensor(eps, dtype=dtype)
