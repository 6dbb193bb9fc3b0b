"""Which questions a protocol asks: from which events, about which targets. Numpy only; no torch.

- `loo`: all events at a user's last timestamp, from all events of strictly earlier time; validation at the distinct
  timestamp before it. Users with fewer than 3 distinct timestamps only train.
- `loo-classic`: the last event from all before it in tie order; validation the one before. For the literature.
- `global`: one cut in time; each test timestamp of a user from everything earlier, the first 50 of them.

Targets of one question form a set. U users, T events, Q questions, M targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.config import TrainingSpan
from recsys_ksa.data.jagged_arrays import offsets_of, ragged_arange
from recsys_ksa.data.spans import training_end
from recsys_ksa.errors import ProtocolError
from recsys_ksa.order import item_hash, splitmix64

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset, Histories
    from recsys_ksa.data.manifest import Manifest

ProtocolName = Literal["loo", "loo-classic", "global"]
Part = Literal["test", "valid"]
RequestTime = Literal["target", "drawn", "none"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
REQUEST_TIMES: tuple[RequestTime, ...] = get_args(RequestTime)
MAX_TIMESTAMPS = 50
"""Test timestamps of a user that `global` asks about, the first ones."""


@dataclass(frozen=True)
class Questions:
    """A frozen table of questions, ordered by user row, then time."""

    protocol: ProtocolName
    part: Part
    number: NDArray[np.int64]
    """[Q] number of the question in the whole table; kept when the table is cut."""
    user: NDArray[np.int64]
    """[Q] row of the user in the histories."""
    cut: NDArray[np.int64]
    """[Q] how many of the user's events are known: events 0 .. cut-1. 0: asked before any event."""
    timestamp: NDArray[np.int64]
    """[Q] the targets' time."""
    last_timestamp: NDArray[np.int64]
    """[Q] time of the last known event; the targets' time where none is known."""
    target_offsets: NDArray[np.int64]
    """[Q + 1] into `target_item`."""
    target_item: NDArray[np.int64]
    """[M] item_index, each once a question, ascending."""

    def __len__(self) -> int:
        return len(self.user)

    @property
    def target_question(self) -> NDArray[np.int64]:
        """[M] row of this table that each target belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.target_offsets))

    @property
    def gap(self) -> NDArray[np.int64]:
        """[Q] seconds from the last known event to the targets."""
        return self.timestamp - self.last_timestamp

    def slice(self, start: int, stop: int) -> "Questions":
        """Return rows start .. stop-1."""
        first, last = self.target_offsets[start], self.target_offsets[stop]
        cut = {
            field.name: getattr(self, field.name)[start:stop]
            for field in fields(self)
            if field.name in ("number", "user", "cut", "timestamp", "last_timestamp")
        }
        return Questions(
            self.protocol,
            self.part,
            **cut,
            target_offsets=self.target_offsets[start : stop + 1] - first,
            target_item=self.target_item[first:last],
        )

    def of_users(self, keep: NDArray[np.bool_]) -> "Questions":
        """Return the questions of users whose row is True in `keep` [U]; numbered anew."""
        rows = np.flatnonzero(keep[self.user])
        targets = np.flatnonzero(keep[self.user][self.target_question])
        sizes = np.diff(self.target_offsets)[rows]
        return Questions(
            self.protocol,
            self.part,
            np.arange(len(rows)),
            self.user[rows],
            self.cut[rows],
            self.timestamp[rows],
            self.last_timestamp[rows],
            offsets_of(sizes),
            self.target_item[targets],
        )


def ask(histories: "Histories", protocol: ProtocolName, part: Part = "test") -> Questions:
    """Return the protocol's questions about these histories.

    Raises:
        ProtocolError: no user has a question.
    """
    begin, end = _span(histories, protocol, part)
    questions = _questions(histories, protocol, part, begin, end)
    if not len(questions):
        raise ProtocolError(
            f"{protocol}: expected {part} events in the data, got none: "
            + ("no event lies in its span of time." if protocol == "global" else "every history is too short.")
            + " Take another protocol or a longer log."
        )
    return questions


def held_out_start(histories: "Histories", protocol: ProtocolName) -> NDArray[np.int64]:
    """Return where the protocol's validation and test events begin in each history, int64 [U]."""
    return _span(histories, protocol, "valid")[0]


def training_mask(histories: "Histories", protocol: ProtocolName) -> NDArray[np.bool_]:
    """Return which events the protocol leaves to training, bool [T]."""
    position = np.arange(histories.num_events) - np.repeat(histories.offsets[:-1], histories.lengths)
    return position < np.repeat(held_out_start(histories, protocol), histories.lengths)


def check_honest(dataset: "Dataset", protocol: ProtocolName, training_span: TrainingSpan) -> None:
    """Refuse a protocol that this data or a run with this training span cannot honestly give.

    Raises:
        ProtocolError: with the reason.
    """
    check_data(protocol, dataset.manifest)
    trained = training_end(dataset, training_span)
    leaks = int((trained > held_out_start(dataset.histories, protocol)).sum())
    if leaks:
        raise ProtocolError(
            f"{protocol}: the run has trained on validation or test events of {leaks} of "
            f"{dataset.histories.num_users} users: its training span is {training_span!r}. Evaluate it with "
            f'--protocol {training_span}, or train with data.split = "{protocol}" or "any".'
        )


def default_protocol(dataset: "Dataset", training_span: TrainingSpan) -> ProtocolName:
    """Return the protocol of a training span; for `any`, `global` where clock and log allow it, else `loo`."""
    if training_span != "any":
        return training_span
    histories = dataset.histories
    if dataset.manifest.clock == "ordinal":
        return "loo"
    valid, test = histories.split["global_valid"], histories.split["global_test"]
    return "global" if np.any((valid > 0) & (test < histories.lengths)) else "loo"


def honest_protocols(dataset: "Dataset", training_span: TrainingSpan) -> dict[ProtocolName, str | None]:
    """Return each protocol with the reason why it is refused; None where it is not."""
    reasons: dict[ProtocolName, str | None] = {}
    for protocol in PROTOCOLS:
        try:
            check_honest(dataset, protocol, training_span)
            ask(dataset.histories, protocol)
            reasons[protocol] = None
        except ProtocolError as error:
            reasons[protocol] = str(error)
    return reasons


def check_data(protocol: ProtocolName, manifest: "Manifest") -> None:
    """Refuse a protocol that means nothing on this data.

    Raises:
        ProtocolError: with the reason.
    """
    if protocol == "global" and manifest.clock == "ordinal":
        raise ProtocolError(
            "global: expected a clock that users share, got an ordinal one: positions of two users cannot be compared. "
            "Take --protocol loo or loo-classic."
        )
    if protocol == "loo-classic" and (manifest.tie == "hash" or manifest.tie_audit.is_artefact):
        greater = manifest.tie_audit.next_id_greater
        why = (
            f"the source sorted its ties (P(next id > id | tie) = {greater:.4f})"
            if manifest.tie_audit.is_artefact and greater is not None
            else "events with equal times are in hash order"
        )
        raise ProtocolError(
            f"loo-classic: expected a meaningful order of events with equal times, but {why}: the last event would "
            "measure the sort. Take --protocol loo, which predicts such events as one set."
        )


def honest_request_times(manifest: "Manifest") -> tuple[RequestTime, ...]:
    """Return the request-time figures this data can give: without real intervals only `none`."""
    return ("none",) if manifest.clock == "ordinal" else REQUEST_TIMES


def usefulness(variants: Sequence[RequestTime]) -> RequestTime:
    """Return the request time on which claims of usefulness rest: `drawn` where there is one."""
    return "drawn" if "drawn" in variants else variants[0]


def check_request_time(variant: RequestTime, manifest: "Manifest") -> None:
    """Refuse a request-time figure on an ordinal clock.

    Raises:
        ProtocolError: with the reason.
    """
    if variant not in honest_request_times(manifest):
        raise ProtocolError(
            f"request time {variant!r}: expected a clock with real intervals, got an ordinal one. "
            "Take --request-time none."
        )


def request_times(
    questions: Questions, variant: RequestTime, user_ids: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the request time of each question and whether one is shown. int64 [Q], bool [Q].

    `drawn` is an integer uniform in [last event, target], from a hash of user id and target time: it depends on
    neither order nor batch. Where none is shown the time is the last event's.

    Args:
        questions: what is asked.
        variant: `target`, `drawn` or `none`.
        user_ids: of all users, by row.
    """
    shown = np.full(len(questions), variant != "none") & (questions.cut > 0)
    if variant == "none":
        return questions.last_timestamp, shown
    if variant == "target":
        return np.where(shown, questions.timestamp, questions.last_timestamp), shown
    rows, inverse = np.unique(questions.user, return_inverse=True)
    user_hash = np.array([item_hash(user_ids[row]) for row in rows], dtype=np.uint64)[inverse]
    with np.errstate(over="ignore"):
        draw = splitmix64(splitmix64(questions.timestamp.astype(np.int64).view(np.uint64)) ^ user_hash)
    # A gap of g seconds has g + 1 integers; the modulo's bias is below 1e-9.
    offset = (draw % (questions.gap.astype(np.uint64) + np.uint64(1))).astype(np.int64)
    return questions.last_timestamp + offset, shown


def _span(histories: "Histories", protocol: ProtocolName, part: Part) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the part's events begin and end in each history, int64 [U] twice."""
    length = histories.lengths
    if protocol == "loo-classic":
        tested = length >= 3
        valid, test = np.where(tested, length - 2, length), np.where(tested, length - 1, length)
    else:
        valid = histories.split[f"{protocol}_valid"].astype(np.int64)
        test = histories.split[f"{protocol}_test"].astype(np.int64)
    return (test, length) if part == "test" else (valid, test)


def _questions(
    histories: "Histories", protocol: ProtocolName, part: Part, begin: NDArray[np.int64], end: NDArray[np.int64]
) -> Questions:
    """Group events begin .. end-1 of each user by timestamp: one question a group."""
    user = np.repeat(np.arange(histories.num_users), end - begin)
    position = ragged_arange(begin, end - begin)
    row = histories.offsets[user] + position
    time = np.asarray(histories.timestamp)[row]
    fresh = np.ones(len(user), dtype=bool)
    fresh[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    group = np.cumsum(fresh) - 1
    heads = np.flatnonzero(fresh)
    first_group = np.searchsorted(user[heads], np.arange(histories.num_users))
    kept = np.arange(len(heads)) - first_group[user[heads]] < MAX_TIMESTAMPS
    cut = position[heads]
    last = np.where(cut > 0, np.asarray(histories.timestamp)[np.maximum(row[heads] - 1, 0)], time[heads])
    item = np.asarray(histories.item_index)[row].astype(np.int64)
    keep = kept[group]
    group, item = group[keep], item[keep]
    order = np.lexsort((item, group))
    group, item = group[order], item[order]
    once = np.ones(len(item), dtype=bool)
    once[1:] = (group[1:] != group[:-1]) | (item[1:] != item[:-1])
    sizes = np.bincount(group[once], minlength=len(heads))[kept]
    return Questions(
        protocol,
        part,
        np.arange(int(kept.sum())),
        user[heads][kept],
        cut[kept],
        time[heads][kept],
        last[kept],
        offsets_of(sizes),
        item[once],
    )
