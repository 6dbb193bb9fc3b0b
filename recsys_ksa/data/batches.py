"""Batches: jagged tensors of events, of the questions asked about them, and of the answers.

A *question* asks for what follows a known part of a history. Letters: U users, T events, Q questions, M targets.
`assemble.py` fills them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from recsys_ksa.data.own_items import OwnItems
from recsys_ksa.features import WeightedRows


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
