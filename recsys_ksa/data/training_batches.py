"""Training batches: the newest events of each training span, packed by a token budget, shuffled each epoch.

Batch `position` of `epoch` is a function of the config, the ranks and those two numbers alone, so training resumes at
the exact next batch, and batches may be built ahead of time, in other processes too.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from recsys_ksa.config import LossConfig, RunConfig
from recsys_ksa.data.assemble import Questions, assemble, question_features, span_start
from recsys_ksa.data.batches import Batch
from recsys_ksa.data.epoch_plan import drawn_lengths, pack, pack_for_ranks, shuffled
from recsys_ksa.data.jagged_arrays import Ints, lowest_within, offsets_of, ragged_arange
from recsys_ksa.errors import ConfigError, DataError
from recsys_ksa.features import EventFeatures
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Histories

MAX_OWN_ITEMS = 512
"""Owned items kept of a user in training: its targets, then the latest. Bounds a batch's (question, item) pairs
where a household has bought thousands of items; evaluation and serving use all."""
_ORDER, _QUESTIONS, _LENGTHS, _RANKS = 0, 1, 3, 4
"""Streams of random numbers, so that neither draw depends on how much the other took."""


class TrainingBatches:
    """The batches of a run: `batch(epoch, position)` for position in 0..num_batches(epoch)-1."""

    def __init__(
        self, histories: "Histories", end: Ints, config: RunConfig, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """Plan batches of events before `end` (int64 [U], `spans.training_end`).

        Args:
            histories: the data set's.
            end: where each user's training span ends.
            config: of the run.
            rank, world_size: which of how many processes that train together; each has batches of its own, as many
                as the others and of nearly as many tokens, and each user is in one of them.

        Raises:
            ConfigError: `data.max_length` is shorter than a chunk.
            DataError: no user has an event in the training span.
        """
        if config.data.max_length < config.model.chunk_size:
            raise ConfigError(
                f"data.max_length: expected at least model.chunk_size {config.model.chunk_size}, "
                f"got {config.data.max_length}. Raise it: histories are cut at chunk boundaries."
            )
        self._histories = histories
        self._config = config
        self._end = np.asarray(end, dtype=np.int64)
        self._start = span_start(self._end, config.data.max_length, config.model.chunk_size)
        self._users = np.flatnonzero(self._end > 0)
        if not len(self._users):
            raise DataError(
                f"training span {config.data.split}: expected users with events in it, got none. "
                "Use a longer log or another data.split."
            )
        self._rank, self._world_size = rank, world_size
        self._plan = _Plan(-1, self._start, [])

    @property
    def longest(self) -> int:
        """Events of the longest history as trained."""
        return int((self._end - self._start).max())

    @property
    def tokens_per_epoch(self) -> int:
        """Event tokens of one epoch."""
        return int((self._end - self._start).sum())

    def num_batches(self, epoch: int) -> int:
        """Return how many batches the epoch has."""
        return len(self._epoch(epoch).batches)

    def batch(self, epoch: int, position: int) -> Batch:
        """Return one batch, on the CPU."""
        plan = self._epoch(epoch)
        users = plan.batches[position]
        place = position * self._world_size + self._rank
        random = np.random.default_rng((self._config.seed, epoch, _QUESTIONS, place))
        start, end = plan.start[users], self._end[users]
        questions = training_questions(self._histories, users, start, end, self._config.loss, random)
        own = self._config.model.own_item_bias
        telling = question_features(self._histories, self._config.model)
        if telling.users:
            questions = replace(questions, told=random.random(len(questions.user)) >= self._config.loss.user_dropout)
        return assemble(
            self._histories,
            users,
            start,
            end,
            questions,
            with_own=own,
            max_own_items=MAX_OWN_ITEMS,
            features=EventFeatures.of(self._config.model),
            telling=telling,
        )

    def _epoch(self, epoch: int) -> "_Plan":
        plan = self._plan  # one name: another thread may ask for another epoch
        if plan.epoch != epoch:
            plan = self._plan = self._planned(epoch)
        return plan

    def _planned(self, epoch: int) -> "_Plan":
        data, budget = self._config.data, self._config.train.batch_tokens
        start = self._start
        if data.stochastic_length is not None:
            lengths = drawn_lengths(
                self._end - start, data.max_length, data.stochastic_length, self._random(epoch, _LENGTHS)
            )
            chunk_size = self._config.model.chunk_size
            start = span_start(self._end, np.maximum(lengths, chunk_size), chunk_size)
        lengths = self._end - start
        order = shuffled(self._users, lengths[self._users], self._random(epoch, _ORDER), data.shuffle_events)
        if self._world_size == 1:
            return _Plan(epoch, start, pack(order, lengths[order], budget))
        steps = pack_for_ranks(order, lengths[order], budget, self._world_size, self._random(epoch, _RANKS))
        return _Plan(epoch, start, [step[self._rank] for step in steps])

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng((self._config.seed, epoch, stream))


@dataclass(frozen=True)
class _Plan:
    """An epoch: where each user's events begin, int64 [U], and the users of each batch."""

    epoch: int
    start: Ints
    batches: list[Ints]


def training_questions(
    histories: "Histories", users: Ints, start: Ints, end: Ints, loss: LossConfig, random: np.random.Generator
) -> Questions:
    """Ask for what follows each known part of the events start..end-1, a random `questions_per_user` of a user.

    `next-event`: one target, the next event. `next-set`: all events of the next distinct timestamp, asked from
    strictly earlier ones; equal items are merged. What follows an event left out before `start` is not asked for;
    a history's own first events are, from the learned start.
    """
    base = np.asarray(histories.offsets)[users]
    asked = _next_event if loss.targets == "next-event" else _next_set
    user, cut, size = asked(histories, base, start, end)

    kept = np.flatnonzero(lowest_within(user, random.random(len(user)), loss.questions_per_user))
    user, cut, size = user[kept], cut[kept], size[kept]

    question, item, weight = _targets(histories, base[user] + cut, size)
    target_time = np.asarray(histories.timestamp[base[user] + cut], dtype=np.int64)
    time = target_time
    if loss.request_time == "drawn":
        last = np.asarray(histories.timestamp[base[user] + np.maximum(cut - 1, 0)], dtype=np.int64)
        time = random.integers(last, target_time, endpoint=True)
    shown = random.random(len(user)) >= loss.request_time_dropout
    return Questions(user, cut, time, shown, question, item, weight, target_time)


def _next_event(histories: "Histories", base: Ints, start: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
    first = np.where(start > 0, start + 1, 0)
    asked = np.maximum(end - first, 0)
    user = np.repeat(np.arange(len(base)), asked)
    return user, ragged_arange(first, asked), np.ones(len(user), dtype=np.int64)


def _next_set(histories: "Histories", base: Ints, start: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
    length = end - start
    timestamp = np.asarray(histories.timestamp[ragged_arange(base + start, length)], dtype=np.int64)
    opens = np.diff(timestamp, prepend=timestamp[:1]) != 0
    opens[offsets_of(length)[:-1][length > 0]] = True
    row = np.flatnonzero(opens)
    size = np.diff(row, append=len(timestamp))
    user = np.repeat(np.arange(len(base)), length)[row]
    cut = ragged_arange(start, length)[row]
    known = (cut > start[user]) | (start[user] == 0)
    return user[known], cut[known], size[known]


def _targets(histories: "Histories", first_row: Ints, size: Ints) -> tuple[Ints, Ints, np.ndarray]:
    question = np.repeat(np.arange(len(size)), size)
    item = np.asarray(histories.item_index[ragged_arange(first_row, size)], dtype=np.int64)
    real = item != UNKNOWN_ITEM
    question, item = question[real], item[real]
    if size.max(initial=0) <= 1:
        return question, item, np.ones(len(item), dtype=np.float32)
    stride = int(item.max(initial=0)) + 1
    key, count = np.unique(question * stride + item, return_counts=True)
    question = key // stride
    total = np.bincount(question, weights=count, minlength=len(size))
    return question, key % stride, (count / total[question]).astype(np.float32)
