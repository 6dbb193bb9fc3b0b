"""What a user already had when each question was asked, for the own-item bias: which items, and when each was met.

Letters: U users, Q questions, O owned items of all users, N events of them, P pairs (question, owned item of its user).
Built by numpy over all users of a batch at once, in a time that grows with events, not with pairs: counts and times of
pairs, some millions a batch, are for the device to spread out (`batches.OwnItems`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recsys_ksa.data.jagged_arrays import Ints, lowest_within, offsets_of, ragged_arange
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Histories


@dataclass(frozen=True)
class OwnItemArrays:
    """Owned items of each user (sorted by index), their events, and which question of the user knows them first."""

    item_offsets: Ints
    """[U + 1] into `item`."""
    item: Ints
    """[O], ascending within a user."""
    question_offsets: Ints
    """[U + 1] into the questions."""
    pair_offsets: Ints
    """[O + 1] into the pairs: an owned item has one with each question of its user, in their order."""
    event_offsets: Ints
    """[O + 1] into the events of owned items."""
    event_time: Ints
    """[N], ascending within an item."""
    event_pair: Ints
    """[N] the pair of the event's item and the first question that knows it; so do all later ones of the user."""
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

    base = np.asarray(histories.offsets)[users]
    rows = ragged_arange(base, known)
    item = np.asarray(histories.item_index[rows], dtype=np.int64)
    stride = 1 + max(int(item.max(initial=0)), int(target_item.max(initial=0)))
    reach = 1 + int(known.max(initial=0))
    assert len(users) * stride * reach < 2**63
    # One number says user, item and place, so that sorting, which is quicker than sorting indices, gives all three.
    events = (np.repeat(np.arange(len(users)) * stride, known) + item) * reach
    events += ragged_arange(np.zeros_like(known), known)
    events = np.sort(events[item != UNKNOWN_ITEM])
    event_key = events // reach
    place = events - event_key * reach

    opens = np.flatnonzero(np.concatenate(([True], event_key[1:] != event_key[:-1]))[: len(events)])
    key, met = event_key[opens], np.diff(opens, append=len(events))
    target_user = question_user[target_question]
    target_key = target_user * stride + target_item
    target_slot, is_owned = _find(target_key, key)
    if max_items is not None and len(key):
        last_place = place[opens + met - 1].astype(np.float64)
        last_place[target_slot[is_owned]] += 2.0**40  # before all others
        kept = lowest_within(key // stride, -last_place, max_items)
        place = place[np.repeat(kept, met)]
        key, met = key[kept], met[kept]
        is_owned &= kept[target_slot]
        target_slot = np.cumsum(kept)[target_slot] - 1

    owner = key // stride
    event_offsets, pair_offsets = offsets_of(met), offsets_of(questions[owner])
    # The first question that knows an event; every later one of the user knows it too.
    event_owner = np.repeat(owner, met)
    more = np.diff(cut, prepend=0)
    first = question_offsets[:-1][asked]
    more[first] = cut[first]
    question = np.repeat(np.arange(len(cut)), more)[offsets_of(known)[event_owner] + place]
    event_pair = np.repeat(pair_offsets[:-1] - question_offsets[owner], met) + question

    target_pair = np.full(len(target_key), -1, dtype=np.int64)
    held = np.flatnonzero(is_owned)
    held = held[question[event_offsets[target_slot[held]]] <= target_question[held]]
    target_pair[held] = pair_offsets[target_slot[held]] + target_question[held] - question_offsets[target_user[held]]
    return OwnItemArrays(
        item_offsets=offsets_of(np.bincount(owner, minlength=len(users))),
        item=key - owner * stride,
        question_offsets=question_offsets,
        pair_offsets=pair_offsets,
        event_offsets=event_offsets,
        event_time=np.asarray(histories.timestamp[base[event_owner] + place], dtype=np.int64),
        event_pair=event_pair,
        target_pair=target_pair,
    )


def _find(wanted: Ints, key: Ints) -> tuple[Ints, np.ndarray]:
    """Return where each wanted key is, or would be, and whether it is there. [M], ascending [O] -> [M], [M]."""
    if not len(key):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    return at, key[at] == wanted
