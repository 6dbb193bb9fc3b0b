"""What a user already had when each question was asked, for the own-item bias: which items, and when each was met.

Letters: U users, Q questions, M targets, O owned items of all users, N events of them, P pairs (question, owned item of
its user). Built by numpy over all users of a batch at once, in a time that grows with events, not with pairs: counts
and times of pairs, some millions a batch, are spread out on the device, where they are first asked for.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recsys_ksa.data.jagged_arrays import Ints, lowest_within, offsets_of, ragged_arange, run_offsets
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Histories


@dataclass(frozen=True)
class OwnItems:
    """Owned items of each user, their events, and which question of the user knows each first. Tensors are int64."""

    item_offsets: Tensor
    """[U + 1] into `item`."""
    item: Tensor
    """[O], ascending within a user."""
    question_offsets: Tensor
    """[U + 1] into the questions."""
    pair_offsets: Tensor
    """[O + 1] into the pairs: an owned item has one with each question of its user, in their order."""
    event_offsets: Tensor
    """[O + 1] into the events of owned items."""
    event_time: Tensor
    """[N] Unix seconds, ascending within an item."""
    event_pair: Tensor
    """[N] the pair of the event's item and the first question that knows it; so do all later ones of the user."""
    target_pair: Tensor
    """[M] the pair of each target's (question, item); -1 where the item is not owned at that question."""
    item_offsets_list: tuple[int, ...]
    """`item_offsets` on the host, so that loops over users need no transfer."""
    question_offsets_list: tuple[int, ...]
    """`question_offsets` on the host."""

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """(O_u, Q_u) of each user, whose pairs are a block of that shape."""
        sizes = (np.diff(offsets).tolist() for offsets in (self.item_offsets_list, self.question_offsets_list))
        return list(zip(*sizes))

    @cached_property
    def num_pairs(self) -> int:
        """P."""
        return sum(owned * questions for owned, questions in self.shapes)

    def spread(self, of_item: Tensor) -> Tensor:
        """Return what is told of owned items for each of their pairs. [O] -> [P]."""
        return torch.repeat_interleave(of_item, self.pair_offsets.diff(), output_size=self.num_pairs)

    @cached_property
    def count(self) -> Tensor:
        """float32 [P] events of the item that the question knows; 0: not owned yet."""
        return self._summed(self.event_pair, torch.ones_like(self.event_pair), self.event_offsets.diff()).float()

    @cached_property
    def first(self) -> Tensor:
        """int64 [P] time of the first of them, Unix seconds; 0 where there is none."""
        begins = self.event_offsets[:-1]
        return self._summed(self.event_pair[begins], self.event_time[begins], self.event_time[begins])

    @cached_property
    def last(self) -> Tensor:
        """int64 [P] time of the last of them, Unix seconds; 0 where there is none."""
        begins = self.event_offsets[:-1]
        since = self.event_time.diff(prepend=self.event_time[:1])
        since[begins] = self.event_time[begins]
        return self._summed(self.event_pair, since, self.event_time[self.event_offsets[1:] - 1])

    def _summed(self, pair: Tensor, value: Tensor, of_item: Tensor) -> Tensor:
        """Return what an item's pairs have gathered, each from those before it and its own. int64 [n] -> [P].

        One sum over all pairs: where an item's begin, what the one before has gathered in all, [O], is taken off.
        """
        added = torch.zeros(self.num_pairs + 1, dtype=torch.int64, device=value.device)
        added.index_add_(0, pair, value).index_add_(0, self.pair_offsets[1:], -of_item)
        return added[:-1].cumsum_(0)


def own_items(
    histories: "Histories",
    users: Ints,
    question_user: Ints,
    cut: Ints,
    target_question: Ints,
    target_item: Ints,
    max_items: int | None,
) -> OwnItems:
    """Gather owned items of whole histories at each question.

    Args:
        histories: the data set's.
        users: rows of `histories`, [U].
        question_user: 0..U-1, non-decreasing, [Q].
        cut: the question knows events 0..cut-1 of its user; non-decreasing within a user, [Q].
        target_question, target_item: [M].
        max_items: owned items kept of a user: those that are targets, then the latest bought; None: all.
    """
    questions = np.bincount(question_user, minlength=len(users))
    question_offsets = offsets_of(questions)
    newly = np.diff(cut, prepend=0)  # events that a question is its user's first to know, [Q]
    first = question_offsets[:-1][questions > 0]
    newly[first] = cut[first]
    known = np.diff(offsets_of(newly)[question_offsets])

    # Rows of events, places among them, and slots of owned items are kept as numbers: masks take numpy far longer.
    rows = ragged_arange(np.asarray(histories.offsets)[users], known)
    item = np.asarray(histories.item_index[rows], dtype=np.int64)
    real = np.flatnonzero(item != UNKNOWN_ITEM)
    stride = 1 + max(int(item.max(initial=0)), int(target_item.max(initial=0)))
    item += np.repeat(np.arange(len(users)) * stride, known)
    key, event_offsets, place = _grouped(item, real)
    owner = key // stride
    held, slot = _find(question_user[target_question] * stride + target_item, key)
    if max_items is not None:
        latest = place[event_offsets[1:] - 1]
        latest[slot] += len(rows)  # targets come before all others
        is_kept = lowest_within(owner, -latest, max_items)
        kept, met = np.flatnonzero(is_kept), np.diff(event_offsets)
        place = place[ragged_arange(event_offsets[kept], met[kept])]
        owner, key, event_offsets = owner[kept], key[kept], offsets_of(met[kept])
        held, slot = held[is_kept[slot]], (np.cumsum(is_kept) - 1)[slot[is_kept[slot]]]

    pair_offsets = offsets_of(questions[owner])
    question_zero = pair_offsets[:-1] - question_offsets[owner]  # the pair an item would have with question 0, [O]
    knows_first = np.repeat(np.arange(len(cut)), newly)[place]  # question, [N]

    known_by_then = knows_first[event_offsets[slot]] <= target_question[held]
    held, slot = held[known_by_then], slot[known_by_then]
    target_pair = np.full(len(target_question), -1, dtype=np.int64)
    target_pair[held] = question_zero[slot] + target_question[held]
    item_offsets = offsets_of(np.bincount(owner, minlength=len(users)))
    return OwnItems(
        item_offsets=torch.from_numpy(item_offsets),
        item=torch.from_numpy(key - owner * stride),
        question_offsets=torch.from_numpy(question_offsets),
        pair_offsets=torch.from_numpy(pair_offsets),
        event_offsets=torch.from_numpy(event_offsets),
        event_time=torch.from_numpy(np.asarray(histories.timestamp[rows[place]], dtype=np.int64)),
        event_pair=torch.from_numpy(np.repeat(question_zero, np.diff(event_offsets)) + knows_first),
        target_pair=torch.from_numpy(target_pair),
        item_offsets_list=tuple(item_offsets.tolist()),
        question_offsets_list=tuple(question_offsets.tolist()),
    )


def _grouped(key: Ints, rows: Ints) -> tuple[Ints, Ints, Ints]:
    """Group some rows by their key: distinct keys [O], ascending; offsets [O + 1]; rows [N], ascending within a key.

    One number says key and row, so that sorting numbers, which is quicker than sorting indices, gives both.
    """
    bits = len(key).bit_length()
    assert int(key.max(initial=0)).bit_length() + bits < 64
    both = np.sort(key[rows] << bits | rows)
    key = both >> bits
    offsets = run_offsets(key)
    return key[offsets[:-1]], offsets, both & ((1 << bits) - 1)


def _find(wanted: Ints, key: Ints) -> tuple[Ints, Ints]:
    """Return which of the wanted keys are there, by key, and where. [M], ascending [O] -> [H], [H]."""
    order = np.argsort(wanted)  # neighbours are found next to each other: twice as fast
    wanted = wanted[order]
    at = np.searchsorted(key, wanted)
    there = np.flatnonzero(at < len(key))
    there = there[key[at[there]] == wanted[there]]
    return order[there], at[there]
