"""Negatives: items drawn for a batch in proportion to a power of their popularity, with their log-probabilities.

Draws are with replacement and a function of (seed, step) alone, so a resumed run draws what it would have drawn.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recsys_ksa.data.jagged_arrays import Ints, ragged_arange
from recsys_ksa.errors import DataError
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Histories


class NegativeSampler:
    """Draws items with probability q proportional to count ** power; an item never met counts as met once.

    Without that floor an item that only validation or test events touch would never be told apart from targets.
    """

    def __init__(self, counts: Ints, power: float, seed: int) -> None:
        """Prepare draws from counts [I]; row 0, the unknown item, is never drawn.

        Raises:
            DataError: there is no item.
        """
        if len(counts) < 2:
            raise DataError("negatives: expected at least one item, got none. Prepare a data set with items.")
        weight = np.maximum(counts, 1).astype(np.float64) ** power
        weight[UNKNOWN_ITEM] = 0.0
        self._cumulative = np.cumsum(weight)
        self._seed = seed
        with np.errstate(divide="ignore"):
            self.log_probability = torch.from_numpy(np.log(weight / self._cumulative[-1]).astype(np.float32))
        """float32 [I], -inf in row 0."""

    def draw(self, num: int, step: int) -> Tensor:
        """Return `num` item indices, int64 [num], on the CPU."""
        uniform = np.random.default_rng((self._seed, step)).random(num) * self._cumulative[-1]
        index = np.searchsorted(self._cumulative, uniform, side="right")
        return torch.from_numpy(np.minimum(index, len(self._cumulative) - 1))


def training_counts(histories: "Histories", end: Ints, num_items: int) -> Ints:
    """Return how often each item occurs in events 0..end-1 of all users. int64 [num_items]."""
    rows = ragged_arange(np.asarray(histories.offsets)[:-1], np.asarray(end, dtype=np.int64))
    return np.bincount(np.asarray(histories.item_index)[rows], minlength=num_items)
