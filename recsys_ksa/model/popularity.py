"""Item bias from how popular an item is now: `model.item_bias = "popularity-7d"`.

Letters: I item rows, F shares. A share is looked up by (day, item); days count whole days of the clock (UTC).
"""

import math
from copy import copy
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys_ksa.data.popularity import DAY, KINDS, WEEK, DayCounts

WINDOWS = (3, WEEK)
"""Days whose events are counted. All events since the beginning are left out: measured, they age (configs/LOG.md)."""
NUM_SHARES = len(WINDOWS) * len(KINDS)
CENTRE_RATE = 0.02
"""Share of each training step's batch in the mean of users' vectors."""
SMOOTHING = 5.0
"""Events added to every item's count: few events say little."""
LEVEL = 8.0
"""An item bias starts at the log of the item's share of events plus this level, where an item with 1% of all events
stands about level with the user's own item of count 4 (`OwnItemBias` starts at 2 + log count, and takes the item bias'
place): popularity for what is new, counts for what is owned."""


class Popularity:
    """Counts of a data set, ready to be looked up. Memory: days * item rows * 8 bytes."""

    def __init__(self, counts: DayCounts, num_items: int) -> None:
        """Hold `counts` of `num_items` item rows, row 0 included."""
        self.first_day, table = counts.cumulative(num_items)
        self.table = torch.from_numpy(table)
        """int32 [D + 1, I, K]: row r counts the days before first_day + r."""
        self.totals = self.table.sum(1, dtype=torch.int64)
        """int64 [D + 1, K]."""

    def to(self, device: torch.device | str) -> Self:
        """Return the same counts on `device`."""
        moved = copy(self)
        moved.table, moved.totals = self.table.to(device), self.totals.to(device)
        return moved

    def log_shares(self, day: Tensor, item_index: Tensor | None = None) -> Tensor:
        """Return log shares of the events before each day, float32 [*shape, F]; 0 is the share of the mean item.

        Args:
            day: int64, of any shape that broadcasts with `item_index`.
            item_index: int64; None: every item on one `day` of shape [], [I, F].
        """
        now = self._row(day)
        rows = [self._row(day - days) for days in WINDOWS]
        if item_index is None:
            counts = [self.table[now] - self.table[row] for row in rows]
        else:
            until = self.table[now, item_index]
            counts = [until - self.table[row, item_index] for row in rows]
        totals = [self.totals[now] - self.totals[row] for row in rows]
        count, total = torch.cat(counts, dim=-1).float(), torch.cat(totals, dim=-1).float()
        return (count + SMOOTHING).log() - (total / self.table.shape[1] + SMOOTHING).log()

    def _row(self, day: Tensor) -> Tensor:
        return (day - self.first_day).clamp(0, len(self.table) - 1)


class PopularityBias(nn.Module):
    """A level plus a weighted sum of log shares. It starts at the log of the share of the last 7 days' events."""

    def __init__(self, num_items: int) -> None:
        """Create the bias of `num_items` item rows."""
        super().__init__()
        self.level = nn.Parameter(torch.tensor(LEVEL - math.log(num_items)))
        self.weight = nn.Parameter(torch.zeros(NUM_SHARES))
        with torch.no_grad():
            self.weight[WINDOWS.index(WEEK) * len(KINDS) + KINDS.index("events")] = 1.0

    def forward(self, log_shares: Tensor) -> Tensor:
        """Return the bias of each item and time. float32 [..., F] -> [...]."""
        return self.level + log_shares.to(self.weight.dtype) @ self.weight


class Centre(nn.Module):
    """Takes the mean off users' vectors: what all users have in common is popularity, and a stale one.

    Without it the match learns each item's popularity of the training days, on top of the bias that knows today's:
    measured in configs/LOG.md. In training the mean is a running one, without a gradient.
    """

    mean: Tensor

    def __init__(self, dim: int) -> None:
        """Start at no mean, [E]."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return vectors [Q, E] without the mean; in training take these into it first."""
        if self.training and len(vectors):
            self.mean.lerp_(_mean_of_all(vectors.detach()), CENTRE_RATE)
        return vectors - self.mean.clone()  # the buffer moves on before the backward pass


def _mean_of_all(vectors: Tensor) -> Tensor:
    """Return the mean of vectors [Q, E], of all processes where several train together."""
    if not (dist.is_available() and dist.is_initialized()):
        return vectors.mean(0)
    total = torch.cat((vectors.sum(0), vectors.new_tensor([len(vectors)])))
    dist.all_reduce(total)
    return total[:-1] / total[-1]


def add_popularity(
    scores: Tensor, bias: PopularityBias, popularity: Popularity, time: Tensor, own: tuple[Tensor, Tensor] | None
) -> None:
    """Add what each item's popularity is worth to the scores, in place, a day at a time.

    Args:
        scores: float32 [Q, I].
        bias: of the network.
        popularity: counts of what may be known.
        time: int64 [Q], the time each question is about.
        own: (question, item) pairs left as they are, as an own-item bias takes the item bias' place; None: no pair.
    """
    kept = None if own is None else scores[own]
    days = day_of(time)
    for day in days.unique():
        scores[days == day] += bias(popularity.log_shares(day)).to(scores.dtype)
    if own is not None and kept is not None:
        scores[own] = kept


def day_of(time: Tensor) -> Tensor:
    """Return the day whose midnight popularity as of these times counts up to. int64, any shape."""
    return time.div(DAY, rounding_mode="floor")
