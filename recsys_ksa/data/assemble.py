"""Batches out of histories: the events of some users, the questions about them, and what each user owned by then.

Letters: U users, T events, Q questions, M targets. Everything is gathered by numpy from the mapped histories, with no
Python loop over events; only the finished arrays become tensors.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_ksa.data.batches import Batch, QuestionRows
from recsys_ksa.data.jagged_arrays import Ints, offsets_of, ragged_arange
from recsys_ksa.data.own_items import own_items
from recsys_ksa.errors import DataError
from recsys_ksa.features import NO_GAP, EventFeatures, QuestionFeatures, gap_buckets
from recsys_ksa.features.sessions import NO_PLACE

if TYPE_CHECKING:
    from recsys_ksa.config import ModelConfig
    from recsys_ksa.data.dataset import Histories

_EMPTY = np.zeros(0, dtype=np.int64)
_NO_FEATURES = EventFeatures()
_NOTHING_TOLD = QuestionFeatures()


@dataclass(frozen=True)
class Questions:
    """Questions about the users of a batch and their targets, in numpy."""

    user: Ints
    """[Q] in 0..U-1, non-decreasing."""
    cut: Ints
    """[Q] the question knows events 0..cut-1 of the history; non-decreasing within a user."""
    request_time: Ints
    """[Q] Unix seconds."""
    shown: NDArray[np.bool_]
    """[Q] whether the request time is shown to the network."""
    target_question: Ints = dataclasses.field(default_factory=lambda: _EMPTY)
    """[M]."""
    target_item: Ints = dataclasses.field(default_factory=lambda: _EMPTY)
    """[M]."""
    target_weight: NDArray[np.float32] = dataclasses.field(default_factory=lambda: _EMPTY.astype(np.float32))
    """[M]."""
    target_time: Ints | None = None
    """[Q] Unix seconds of the targets."""
    told: NDArray[np.bool_] | None = None
    """[Q] whether the user's features are told; None: always."""


def questions_batch(
    histories: "Histories",
    users: Ints,
    question_user: Ints,
    cuts: Ints,
    request_times: Ints | None = None,
    *,
    chunk_size: int,
    max_length: int | None = None,
    own_items: bool = False,
    max_own_items: int | None = None,
    features: EventFeatures = _NO_FEATURES,
    telling: QuestionFeatures = _NOTHING_TOLD,
) -> Batch:
    """Return a batch that asks each user questions at given cuts, for evaluation: no targets.

    A user's events reach up to the largest of the user's cuts.

    Args:
        histories: the data set's.
        users: rows of `histories` (0..num_users-1, not `user_index`), int64 [U].
        question_user: which of `users` each question is about, 0..U-1, non-decreasing, int64 [Q].
        cuts: the question knows events 0..cut-1 (0: none); non-decreasing within a user, int64 [Q].
        request_times: Unix seconds shown to the network, int64 [Q]; None: no question shows one.
        chunk_size: the model's.
        max_length: only the last events before the largest cut, at most so many, cut forward to a chunk boundary;
            None: whole histories.
        own_items: gather what each user owned at each question (from the whole history, whatever `max_length`).
        max_own_items: keep only so many owned items of a user, the latest; None: all.
        features: of events, that the network reads.
        telling: of questions, that it is told.

    Raises:
        DataError: cuts decrease within a user, or `max_length` leaves out the event a question asks from.
    """
    users, question_user, cuts = (np.asarray(a, dtype=np.int64) for a in (users, question_user, cuts))
    same_user = question_user[1:] == question_user[:-1]
    if np.any(np.diff(question_user) < 0) or np.any(np.diff(cuts)[same_user] < 0):
        raise DataError("questions_batch: expected questions sorted by user, then cut. Sort them before the call.")
    end = np.zeros(len(users), dtype=np.int64)
    np.maximum.at(end, question_user, cuts)
    shown = np.full(len(cuts), request_times is not None)
    times = np.zeros(len(cuts), dtype=np.int64) if request_times is None else np.asarray(request_times, dtype=np.int64)
    questions = Questions(question_user, cuts, times, shown)
    start = span_start(end, max_length, chunk_size)
    return assemble(
        histories,
        users,
        start,
        end,
        questions,
        with_own=own_items,
        max_own_items=max_own_items,
        features=features,
        telling=telling,
    )


def question_features(histories: "Histories", config: "ModelConfig") -> QuestionFeatures:
    """Return what questions about these users tell a network, by its config."""
    if not config.user_features or histories.users is None:
        return QuestionFeatures.of(config, {})
    return QuestionFeatures.of(config, histories.users.features)


def span_start(end: Ints, max_length: int | Ints | None, chunk_size: int) -> Ints:
    """Return where the last `max_length` events before `end` begin, moved forward to a chunk boundary. [U] -> [U].

    Cut elsewhere, the chunk phase would shift and the model measured would not be the one served.
    """
    if max_length is None:
        return np.zeros_like(end)
    return -(-np.maximum(end - max_length, 0) // chunk_size) * chunk_size


def assemble(
    histories: "Histories",
    users: Ints,
    start: Ints,
    end: Ints,
    questions: Questions,
    *,
    with_own: bool,
    max_own_items: int | None,
    features: EventFeatures = _NO_FEATURES,
    telling: QuestionFeatures = _NOTHING_TOLD,
) -> Batch:
    """Gather events start..end-1 of each user and the questions about them into a batch.

    Raises:
        DataError: a question asks from an event before `start`.
    """
    base = np.asarray(histories.offsets)[users]
    lengths = end - start
    offsets = offsets_of(lengths)
    rows = ragged_arange(base + start, lengths)
    timestamp = np.asarray(histories.timestamp[rows], dtype=np.int64)
    gap = np.empty_like(timestamp)
    np.subtract(timestamp[1:], timestamp[:-1], out=gap[1:])
    first = offsets[:-1][lengths > 0]
    gap[first] = timestamp[first] - histories.timestamp[np.maximum(rows[first] - 1, 0)]
    gap_bucket = gap_buckets(gap)
    gap_bucket[offsets[:-1][(start == 0) & (lengths > 0)]] = NO_GAP

    user, cut = questions.user, questions.cut
    known = cut > 0
    if np.any(known & (cut <= start[user])):
        raise DataError(
            "batch: a question asks from an event before the given span. Give a larger max_length or fewer cuts."
        )
    row = np.where(known, offsets[:-1][user] + cut - 1 - start[user], -1)
    last = np.zeros(len(cut), dtype=np.int64)
    last[known] = timestamp[row[known]]
    shown = questions.shown & known
    request_time = np.where(shown, np.maximum(questions.request_time, last), last)
    request_bucket = np.where(shown, gap_buckets(request_time - last), NO_GAP)

    known_users = histories.users if telling.users else None
    told = telling.rows(known_users, users[user], request_time, shown, questions.told)
    own = None
    if with_own:
        target_question, target_item = questions.target_question, questions.target_item
        own = own_items(histories, users, user, cut, target_question, target_item, max_own_items)
    event_type = histories.event_type
    return Batch(
        offsets=torch.from_numpy(offsets),
        first_position=torch.from_numpy(start),
        item_index=torch.from_numpy(np.asarray(histories.item_index[rows], dtype=np.int64)),
        event_type=None if event_type is None else torch.from_numpy(np.asarray(event_type[rows], dtype=np.int64)),
        gap_bucket=torch.from_numpy(gap_bucket),
        timestamp=torch.from_numpy(timestamp),
        question_row=torch.from_numpy(row),
        question_user=torch.from_numpy(user),
        request_bucket=torch.from_numpy(request_bucket),
        request_time=torch.from_numpy(request_time),
        target_question=torch.from_numpy(questions.target_question),
        target_item=torch.from_numpy(questions.target_item),
        target_weight=torch.from_numpy(questions.target_weight),
        own=own,
        target_time=None if questions.target_time is None else torch.from_numpy(questions.target_time),
        features=event_columns(histories, base, start, end, features),
        told=QuestionRows.of(told),
    )


def event_columns(
    histories: "Histories", base: Ints, start: Ints, end: Ints, features: EventFeatures
) -> dict[str, Tensor]:
    """Return the features of events start..end-1 of each user, [T] each, by name.

    Args:
        histories: the data set's.
        base: row of each user's first event, int64 [U].
        start, end: int64 [U].
        features: which.
    """
    if not features.num_rows:
        return {}
    before = np.minimum(start, features.events_before)
    lengths = before + end - start
    rows = ragged_arange(base + start - before, lengths)
    timestamp = np.asarray(histories.timestamp[rows], dtype=np.int64)
    value = None
    if features.value_edges and histories.value is not None:
        value = np.asarray(histories.value[rows], dtype=np.float64)
    nothing = np.full(len(base), NO_PLACE)
    columns, _ = features.columns(timestamp, value, offsets_of(lengths), nothing, nothing)
    given = ragged_arange(offsets_of(lengths)[:-1] + before, end - start)
    return {name: torch.from_numpy(column[given]) for name, column in columns.items()}
