"""Own-item bias: what a user's own counts say of an item, learned.

On repeat data the user's own counts are most of the signal. The bias is a function of how often the user met the
item, how long ago, and in what rhythm, added to the scores of the user's own items only.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys_ksa.model.seen import SeenItems

HIDDEN = 16
DAY = 86_400.0
ITEMS_AT_ONCE = 4096
"""Items of one user computed at once: what is between stays in a core's cache."""


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


@dataclass(frozen=True)
class ArrayOwnItemBias:
    """`OwnItemBias` in NumPy, for an answer: one user's items, some or tens of thousands. Weights as they were taken.

    hidden: [HIDDEN, 6], shift: [HIDDEN, 1], out: [HIDDEN]; numbers are of the weights' type.
    """

    unit: float
    base: float
    log_count: float
    hidden: NDArray[np.floating]
    shift: NDArray[np.floating]
    out: NDArray[np.floating]

    @staticmethod
    def of(bias: OwnItemBias) -> "ArrayOwnItemBias":
        """Return the same function."""
        weights = {name: value.detach().cpu().numpy() for name, value in bias.state_dict().items()}
        return ArrayOwnItemBias(
            unit=bias.unit,
            base=float(weights["base"]) + float(weights["out.bias"][0]),
            log_count=float(weights["log_count"]),
            hidden=weights["hidden.weight"],
            shift=weights["hidden.bias"][:, None],
            out=weights["out.weight"][0],
        )

    def __call__(self, seen: SeenItems, now: int) -> NDArray[np.floating]:
        """Return the bias of each of a user's items; `now` as for `OwnItemBias`."""
        bias = np.empty(len(seen), self.hidden.dtype)
        for start in range(0, len(seen), ITEMS_AT_ONCE):
            some = slice(start, start + ITEMS_AT_ONCE)
            bias[some] = self._of_some(seen.count[some], seen.first[some], seen.last[some], now)
        return bias

    def _of_some(
        self, count: NDArray[np.int32], first: NDArray[np.int64], last: NDArray[np.int64], now: int
    ) -> NDArray[np.floating]:
        dtype = self.hidden.dtype
        log_count = np.log(count.astype(dtype))
        repeats = (count - 1).astype(dtype)
        again = (repeats > 0).astype(dtype)
        age = np.maximum(now - last, 0).astype(dtype) / self.unit
        span = (last - first).astype(dtype) / self.unit
        rhythm = span / np.maximum(repeats, 1)
        overdue = np.log((age + 0.05) / (rhythm + 0.05)) * again
        logs = (np.log(column + 1) for column in (age, rhythm, span))  # log1p is several times slower
        log_age, log_rhythm, log_span = logs
        hidden = self.hidden @ np.stack((log_count, log_age, log_rhythm, again, overdue, log_span))
        hidden += self.shift
        hidden /= 1 + np.exp(-hidden)  # silu
        return self.out @ hidden + self.log_count * log_count + self.base
