"""Batches: jagged tensors of events, of the questions asked about them, and of the answers.

A *question* asks for what follows a known part of a history. Letters: U users, T events, Q questions, M targets,
O owned items, P pairs (question, owned item of its user). Everything is gathered by numpy from the mapped
histories, with no Python loop over events; only the finished arrays become tensors.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_ksa.data.jagged_arrays import Ints, offsets_of, ragged_arange
from recsys_ksa.data.own_items import OwnItemArrays, own_items
from recsys_ksa.errors import DataError
from recsys_ksa.features import NO_GAP, EventFeatures, QuestionFeatures, WeightedRows, gap_buckets
from recsys_ksa.features.sessions import NO_PLACE

if TYPE_CHECKING:
    from recsys_ksa.config import ModelConfig
    from recsys_ksa.data.dataset import Histories

_EMPTY = np.zeros(0, dtype=np.int64)
_NO_FEATURES = EventFeatures()
_NOTHING_TOLD = QuestionFeatures()


@dataclass(frozen=True)
class OwnItems:
    """What each user already had when each question was asked; int64 fields as in `OwnItemArrays`, as tensors.

    What is told of each pair is worked out where it is first asked for, on the tensors' device.
    """

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
    """[N] Unix seconds."""
    event_pair: Tensor
    """[N] from which pair on each event is known."""
    target_pair: Tensor
    """[M]: the pair of each target; -1 where it is not owned at its question."""
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

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on `device`."""
        return changed(self, Tensor, lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Self:
        """Return a copy in page-locked memory."""
        return changed(self, Tensor, Tensor.pin_memory)


@dataclass(frozen=True)
class QuestionRows:
    """What each question tells beside the history, as tensors; fields as in `WeightedRows`."""

    row: Tensor
    weight: Tensor
    offsets: Tensor

    @staticmethod
    def of(rows: WeightedRows | None) -> "QuestionRows | None":
        """Return the rows as tensors."""
        return rows and QuestionRows(*map(torch.from_numpy, (rows.row, rows.weight, rows.offsets)))

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on `device`."""
        return changed(self, Tensor, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """Events of U users, questions about them, and targets. All jagged, int64 unless said."""

    offsets: Tensor
    """[U + 1] into the events."""
    first_position: Tensor
    """[U] true index of the first given event within its history; a multiple of the chunk size."""
    item_index: Tensor
    """[T]."""
    event_type: Tensor | None
    """[T], or None where the data set has none."""
    gap_bucket: Tensor
    """[T] bucket of the seconds since the previous event of the whole history."""
    timestamp: Tensor
    """[T] Unix seconds."""
    question_row: Tensor
    """[Q] row in T of the last event the question knows; -1: asked before any event."""
    question_user: Tensor
    """[Q] in 0..U-1, non-decreasing."""
    request_bucket: Tensor
    """[Q] bucket of the seconds from the last event to the request; `NO_GAP` where no time is shown."""
    request_time: Tensor
    """[Q] Unix seconds; the last event's time where none is shown, 0 where there is no event either."""
    target_question: Tensor
    """[M] in 0..Q-1, non-decreasing."""
    target_item: Tensor
    """[M]."""
    target_weight: Tensor
    """float32 [M]; sums to 1 over a question's targets."""
    own: OwnItems | None
    target_time: Tensor | None = None
    """[Q] Unix seconds of the targets, in training; popularity is as of then."""
    features: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """[T] each, by name: the features that are on (`EventFeatures`)."""
    told: QuestionRows | None = None
    """Of Q questions (`QuestionFeatures`); None where no such feature is on."""

    @property
    def num_users(self) -> int:
        """Users of the batch (U)."""
        return self.offsets.shape[0] - 1

    @property
    def num_events(self) -> int:
        """Events of the batch (T)."""
        return self.item_index.shape[0]

    @property
    def num_questions(self) -> int:
        """Questions of the batch (Q)."""
        return self.question_row.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on `device`, not waiting for it."""
        return changed(self, Tensor, lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Self:
        """Return a copy in page-locked memory, from which `to` runs beside the device's work."""
        return changed(self, Tensor, Tensor.pin_memory)


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
    before = np.asarray(histories.timestamp[np.maximum(rows - 1, 0)], dtype=np.int64)
    gap_bucket = gap_buckets(timestamp - before)
    whole = (start == 0) & (lengths > 0)
    gap_bucket[offsets[:-1][whole]] = NO_GAP

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
        arrays = own_items(histories, users, user, cut, target_question, target_item, max_own_items)
        own = _own_tensors(arrays)
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


def _own_tensors(arrays: OwnItemArrays) -> OwnItems:
    fields = {f.name: torch.from_numpy(getattr(arrays, f.name)) for f in dataclasses.fields(arrays)}
    return OwnItems(
        **fields,
        item_offsets_list=tuple(arrays.item_offsets.tolist()),
        question_offsets_list=tuple(arrays.question_offsets.tolist()),
    )


def changed(holder: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return a copy of a dataclass with `change` applied to each field of `kind`, also of those within its fields."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(holder):
        value = getattr(holder, field.name)
        if isinstance(value, kind):
            values[field.name] = change(value)
        elif isinstance(value, dict):
            values[field.name] = {name: change(column) for name, column in value.items()}
        elif dataclasses.is_dataclass(value):
            values[field.name] = changed(value, kind, change)
    return dataclasses.replace(holder, **values)
