"""What each question's user had: item -> (count, first, last), for any prefix of any history, without a loop.

Of an item's events in a prefix only the last one matters once each event knows how many of that item came up to it,
when the first came, and where the next one is. U users, T events, Q questions, P (question, item) pairs.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.data.jagged_arrays import ragged_arange
from recsys_ksa.evaluate.protocol import Questions
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Histories


@dataclass(frozen=True)
class Owned:
    """(question, item) pairs, ordered by question."""

    question: NDArray[np.int64]
    """[P] row of the questions asked about."""
    item: NDArray[np.int64]
    """[P] item_index."""
    event: NDArray[np.int64]
    """[P] row in T of the item's last event in the prefix."""
    count: NDArray[np.int64]
    """[P] events of the item in the prefix."""
    first: NDArray[np.int64]
    """[P] time of its first event."""
    last: NDArray[np.int64]
    """[P] time of its last event."""


class Ownership:
    """Answers, for a prefix of a history, which items it holds and how often."""

    def __init__(self, histories: "Histories") -> None:
        self.histories = histories
        self._latest: tuple[Questions, Owned] | None = None
        user = np.repeat(np.arange(histories.num_users), histories.lengths)
        item = np.asarray(histories.item_index)
        self.time = np.asarray(histories.timestamp)
        # Rows are in order within a user, so a stable sort keeps time order within (user, item).
        order = np.lexsort((item, user))
        same = np.zeros(len(order), dtype=bool)
        same[1:] = (user[order[1:]] == user[order[:-1]]) & (item[order[1:]] == item[order[:-1]])
        head = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        self.occurrence = np.empty(len(order), dtype=np.int64)
        self.occurrence[order] = np.arange(len(order)) - head + 1
        self.first_event = np.empty(len(order), dtype=np.int64)
        self.first_event[order] = order[head]
        self.previous_event = np.full(len(order), -1, dtype=np.int64)
        self.previous_event[order[1:][same[1:]]] = order[:-1][same[1:]]
        self.next_event = np.full(len(order), len(order), dtype=np.int64)
        self.next_event[order[:-1][same[1:]]] = order[1:][same[1:]]
        self._order = order
        self._stride = int(item.max(initial=0)) + 1
        self._key = user[order] * self._stride + item[order]

    def before(self, questions: Questions, start: NDArray[np.int64] | None = None) -> Owned:
        """Return what each question's user had in the events known to it: events start .. cut-1 of the history.

        The last answer about whole histories is kept, since many scorers ask it of one chunk of questions.

        Args:
            questions: what is asked.
            start: int64 [Q]; None: whole histories.
        """
        if start is not None:
            return self._gather(questions, start)
        if self._latest is None or self._latest[0] is not questions:
            self._latest = (questions, self._gather(questions, None))
        return self._latest[1]

    def last_met(self, questions: Questions) -> NDArray[np.int64]:
        """Return how many events ago each target was last met, int64 [M]: 1 is the last known event, 0 never."""
        question = questions.target_question
        user, item = questions.user[question], questions.target_item
        end = self.histories.offsets[user] + questions.cut[question]
        key = np.where(item < self._stride, user * self._stride + item, -1)
        key[item == UNKNOWN_ITEM] = -1
        first = np.searchsorted(self._key, key, side="left")
        low, high = first.copy(), np.searchsorted(self._key, key, side="right")
        # All targets at once: halve the item's events of the user until those before the cut are told from the others.
        while np.any(open_ := low < high):
            middle = (low + high) // 2
            before = open_ & (self._order[np.minimum(middle, len(self._order) - 1)] < end)
            low = np.where(before, middle + 1, low)
            high = np.where(open_ & ~before, middle, high)
        met = low > first
        return np.where(met, end - self._order[np.maximum(low - 1, 0)], 0)

    def _gather(self, questions: Questions, start: NDArray[np.int64] | None) -> Owned:
        base = self.histories.offsets[questions.user]
        begin = base if start is None else base + start
        end = base + questions.cut
        event = ragged_arange(begin, end - begin)
        question = np.repeat(np.arange(len(questions)), end - begin)
        item = np.asarray(self.histories.item_index)[event].astype(np.int64)
        latest = (self.next_event[event] >= end[question]) & (item != UNKNOWN_ITEM)
        last_event, first_event = event[latest], self.first_event[event[latest]]
        count = self.occurrence[last_event]
        if start is not None:
            # Each pair has one first and one last event in the span: sorted alike, they meet.
            earliest = (self.previous_event[event] < begin[question]) & (item != UNKNOWN_ITEM)
            place = np.lexsort((item[latest], question[latest]))
            first_event = first_event.copy()
            first_event[place] = event[earliest][np.lexsort((item[earliest], question[earliest]))]
            count = count - self.occurrence[first_event] + 1
        return Owned(question[latest], item[latest], last_event, count, self.time[first_event], self.time[last_event])

    def decayed_log_count(self, half_life: float) -> NDArray[np.float64]:
        """Return log2 of each event's decayed count of its item at that event's time, float64 [T].

        The count of an item at time t is the sum over its events of 2 ** -((t - time) / half_life).
        """
        count = np.ones(len(self.time))
        by_rank = np.argsort(self.occurrence, kind="stable")
        bounds = np.searchsorted(self.occurrence[by_rank], np.arange(2, int(self.occurrence.max(initial=1)) + 2))
        for start, stop in pairwise(bounds):
            event = by_rank[start:stop]
            previous = self.previous_event[event]
            count[event] += count[previous] * np.exp2(-(self.time[event] - self.time[previous]) / half_life)
        return np.log2(count)
