"""What a user already had when each question was asked: item -> (count, first time, last time), for the own-item bias.

Letters: U users, Q questions, O owned items of all users, P pairs (question, owned item of its user).
Built by numpy over all users of a batch at once; the only loop is over users, to add up [Q_u, O_u] blocks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.data.jagged_arrays import Ints, offsets_of, ragged_arange, rank_within
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Histories

_NEVER = np.iinfo(np.int64).min


@dataclass(frozen=True)
class OwnItemArrays:
    """Owned items of each user (sorted by index) and, for each question of the user, what was owned by then."""

    item_offsets: Ints
    """[U + 1] into `item`."""
    item: Ints
    """[O], ascending within a user."""
    pair_offsets: Ints
    """[U + 1] into the pairs; a user's block is row-major [Q_u, O_u]."""
    count: NDArray[np.float32]
    """[P] events of the item that the question knows; 0: not owned yet."""
    first: Ints
    """[P] time of the first of them, 0 where there is none."""
    last: Ints
    """[P] time of the last of them, 0 where there is none."""
    target_pair: Ints
    """[M] the pair of each target's (question, item); -1 where the item is not owned at that question."""


def own_items(
    histories: "Histories",
    users: Ints,
    question_user: Ints,
    cut: Ints,
    target_question: Ints,
    target_item: Ints,
    max_items: int | None,
) -> OwnItemArrays:
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
    known = np.zeros(len(users), dtype=np.int64)
    asked = questions > 0
    known[asked] = cut[question_offsets[1:][asked] - 1]

    rows = ragged_arange(np.asarray(histories.offsets)[users], known)
    owner = np.repeat(np.arange(len(users)), known)
    place = ragged_arange(np.zeros_like(known), known)
    item = np.asarray(histories.item_index[rows], dtype=np.int64)
    timestamp = np.asarray(histories.timestamp[rows], dtype=np.int64)
    real = item != UNKNOWN_ITEM
    owner, place, item, timestamp = owner[real], place[real], item[real], timestamp[real]

    target_user = question_user[target_question]
    stride = 1 + max(int(item.max(initial=0)), int(target_item.max(initial=0)))
    target_key = target_user * stride + target_item
    key, slot = np.unique(owner * stride + item, return_inverse=True)
    if max_items is not None and len(key):
        kept = _kept_slots(key // stride, slot, place, np.isin(key, target_key), max_items)
        in_kept = kept[slot]
        owner, place, timestamp = owner[in_kept], place[in_kept], timestamp[in_kept]
        key, slot = key[kept], (np.cumsum(kept) - 1)[slot[in_kept]]

    slot_owner = key // stride
    owned = np.bincount(slot_owner, minlength=len(users)).astype(np.int64)
    item_offsets = offsets_of(owned)
    pair_offsets = offsets_of(questions * owned)

    # The first question that knows an event; every later one of the user knows it too.
    reach = int(max(cut.max(initial=0), place.max(initial=0) + 1)) + 1
    question = np.searchsorted(question_user * reach + cut, owner * reach + place + 1, side="left")
    pair = pair_offsets[owner] + (question - question_offsets[owner]) * owned[owner] + slot - item_offsets[owner]
    count = np.bincount(pair, minlength=pair_offsets[-1]).astype(np.float32)
    first = np.empty(pair_offsets[-1], dtype=np.int64)
    last = np.full(pair_offsets[-1], _NEVER)
    last[pair] = timestamp  # in time order, and of repeated indices numpy keeps the last
    slot_first = np.zeros(len(key), dtype=np.int64)
    slot_first[slot[::-1]] = timestamp[::-1]
    for u in np.flatnonzero(questions * owned):
        block = slice(pair_offsets[u], pair_offsets[u + 1])
        shape = (questions[u], owned[u])
        np.cumsum(count[block].reshape(shape), axis=0, out=count[block].reshape(shape))
        np.maximum.accumulate(last[block].reshape(shape), axis=0, out=last[block].reshape(shape))
        first[block].reshape(shape)[:] = slot_first[item_offsets[u] : item_offsets[u + 1]]
    never = count == 0
    first[never] = 0
    last[never] = 0

    target_slot = np.minimum(np.searchsorted(key, target_key), max(len(key) - 1, 0))
    target_pair = np.full(len(target_key), -1, dtype=np.int64)
    if len(key):
        candidate = pair_offsets[target_user] + target_slot - item_offsets[target_user]
        candidate += (target_question - question_offsets[target_user]) * owned[target_user]
        found = key[target_slot] == target_key
        found[found] = count[candidate[found]] > 0
        target_pair[found] = candidate[found]
    return OwnItemArrays(item_offsets, key % stride, pair_offsets, count, first, last, target_pair)


def _kept_slots(slot_owner: Ints, slot: Ints, place: Ints, is_target: NDArray[np.bool_], max_items: int) -> np.ndarray:
    last_place = np.zeros(len(slot_owner), dtype=np.int64)
    last_place[slot] = place
    return rank_within(slot_owner, ~is_target, -last_place) < max_items
