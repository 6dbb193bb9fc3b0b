"""Metrics of the lists themselves, whatever the targets: how many items they reach, how popular those are.

- `coverage@10`: share of all items that stand in at least one question's first ten. It belongs to all lists together,
  and resampled users would reach fewer: its row has no interval (low = high = value).
- `novelty@10`: mean over the list of -log2 of the item's share of the counted events, in bits.
- `popularity-bias@10`: log2 of how popular the list is, on average, over how popular the user's known events are. 0: as
  popular as what the user takes; 1: twice as popular. None is known of a user without events.

Popularity counts the events that the protocol leaves to training, one more each item. Q questions, I items.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.evaluate.metrics import TOP
from recsys_ksa.evaluate.protocol import ProtocolName, Questions, training_mask

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Histories

COVERAGE = f"coverage@{TOP}"
USER_LIST_METRICS = (f"novelty@{TOP}", f"popularity-bias@{TOP}")
"""Those that each user has a value of."""
LIST_METRICS = (COVERAGE, *USER_LIST_METRICS)


class ListMetrics:
    """Measures lists of items against how often items were met."""

    def __init__(self, histories: "Histories", num_items: int, protocol: ProtocolName) -> None:
        self.num_items = num_items
        item = np.asarray(histories.item_index)
        count = np.bincount(item[training_mask(histories, protocol)], minlength=num_items + 1) + 1.0
        count[0] = 0.0
        self.share = count / count.sum()
        """[I + 1] of the counted events; 0 for the unknown item."""
        self._before = np.concatenate(([0.0], np.cumsum(self.share[item])))
        self._offsets = histories.offsets

    def of_questions(self, top: NDArray[np.int32], questions: Questions) -> dict[str, NDArray[np.float64]]:
        """Return each of `USER_LIST_METRICS`, float64 [Q]; NaN where there is nothing to measure.

        Args:
            top: item_index, int32 [Q, 10]; 0 where a list is shorter.
            questions: that were asked.
        """
        listed = top > 0
        size = np.where(listed.any(axis=1), listed.sum(axis=1), np.nan)
        share = self.share[top]
        bits = -np.log2(np.where(listed, share, 1.0)).sum(axis=1)
        begin = self._offsets[questions.user]
        known = self._before[begin + questions.cut] - self._before[begin]
        with np.errstate(divide="ignore", invalid="ignore"):
            bias = np.log2(share.sum(axis=1) / size) - np.log2(known / questions.cut)
        bias[questions.cut == 0] = np.nan
        return dict(zip(USER_LIST_METRICS, (bits / size, bias)))

    def coverage(self, top: NDArray[np.int32]) -> float:
        """Return the share of all items that at least one list holds."""
        return len(np.setdiff1d(top, 0)) / self.num_items
