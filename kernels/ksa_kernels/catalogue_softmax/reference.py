"""The oracle: the whole table of scores."""

import torch
from torch import Tensor


def log_z(users: Tensor, items: Tensor, log_popularity: Tensor | None) -> Tensor:
    """Return log sum_i exp(users[t] . items[i] + log_popularity[i]), [T]."""
    dtype = torch.float64 if users.dtype is torch.float64 else torch.float32
    scores = users.to(dtype) @ items.to(dtype).T
    return (scores if log_popularity is None else scores + log_popularity.to(dtype)).logsumexp(1)
