"""Own-item bias: what a user's own counts say of an item, learned.

On repeat data the user's own counts are most of the signal. The bias is a function of how often the user met the
item, how long ago, and in what rhythm, added to the scores of the user's own items only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 16
DAY = 86_400.0


class OwnItemBias(nn.Module):
    """Linear in log count (it starts at the frequency rule: a calibrated softmax over counts) plus a small network."""

    def __init__(self, unit: float = DAY) -> None:
        """Create the bias; `unit` is the time scale in timestamp units (a day; 1 on an ordinal clock)."""
        super().__init__()
        self.unit = unit
        self.base = nn.Parameter(torch.tensor(2.0))
        self.log_count = nn.Parameter(torch.tensor(1.0))
        self.hidden = nn.Linear(6, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, count: Tensor, first: Tensor, last: Tensor, now: Tensor) -> Tensor:
        """Return the bias of each (user, item) pair; all tensors of one shape, in and out.

        Args:
            count: how often the user met the item, at least 1 where the bias is used.
            first, last: timestamps of the first and the last meeting.
            now: the request time, or the user's last event's time where none is given.
        """
        dtype = self.base.dtype
        repeats = (count - 1).clamp(min=0)
        again = (repeats > 0).to(dtype)
        log_count = count.clamp(min=1).to(dtype).log()
        age = (now - last).clamp(min=0).to(dtype) / self.unit
        span = (last - first).to(dtype) / self.unit
        rhythm = span / repeats.clamp(min=1).to(dtype)
        overdue = torch.log((age + 0.05) / (rhythm + 0.05)) * again
        features = torch.stack(
            (log_count, age.log1p(), rhythm.log1p(), again, overdue, span.log1p()),
            dim=-1,
        )
        learned = self.out(F.silu(self.hidden(features))).squeeze(-1)
        return self.base + self.log_count * log_count + learned
