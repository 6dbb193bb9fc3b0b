"""ChunkLayout: the only place that knows where event tokens and summary tokens sit, and who is where.

Letters: U users, N events of one history, k chunk_size, m summaries_per_chunk, W window_chunks, V max_visible_chunks.
A history's events are i = 0..N-1, the chunk of i is i // k, and its N // k closed chunks have m summaries each (or
only those of them that an event sees, `unseen_summaries`).
Rows of event tensors are ordered by user, then event; rows of summary tensors by user, chunk, slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ksa_kernels.errors import ShapeError

Integers = Sequence[int] | Tensor


class UserSpan(NamedTuple):
    """Which of one history's rows a layout holds (plain integers)."""

    num_events: int
    """Events of the whole history, N."""
    query_start: int
    """First event that asks; events query_start..N-1 are the event queries."""
    key_start: int
    """First event whose key and value are given."""
    first_query_chunk: int
    """Chunk of query_start; summary queries are those of this chunk up to the last that has summaries."""
    first_key_chunk: int
    """First chunk whose summaries are given as keys."""
    num_summarised: int
    """Chunks that have summaries, from the first on: the N // k closed ones, or those of them that an event sees."""

    @property
    def num_query_events(self) -> int:
        """Event queries of this user."""
        return self.num_events - self.query_start

    @property
    def num_key_events(self) -> int:
        """Event keys of this user."""
        return self.num_events - self.key_start

    @property
    def num_query_chunks(self) -> int:
        """Chunks whose summaries ask."""
        return max(0, self.num_summarised - self.first_query_chunk)

    @property
    def num_key_chunks(self) -> int:
        """Chunks whose summaries are keys."""
        return max(0, self.num_summarised - self.first_key_chunk)


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """Which user, chunk and slot each row of the event and summary tensors belongs to.

    Build it once a batch with `from_offsets`; tensors that only some implementations need are made when asked for.
    """

    spans: tuple[UserSpan, ...]
    chunk_size: int
    summaries_per_chunk: int
    window_chunks: int | None
    max_visible_chunks: int | None
    device: torch.device
    plans: dict[str, Any] = field(default_factory=dict, repr=False)
    """What an implementation works out once for this layout and wants to find again (its name -> its plan)."""

    @staticmethod
    def from_offsets(
        offsets: Integers,
        *,
        chunk_size: int,
        summaries_per_chunk: int,
        window_chunks: int | None,
        max_visible_chunks: int | None = None,
        query_start: Integers | None = None,
        key_start: Integers | None = None,
        unseen_summaries: bool = True,
    ) -> ChunkLayout:
        """Describe a jagged batch of histories.

        Args:
            offsets: [U + 1] integers from 0, non-decreasing: user u's whole history has offsets[u+1] - offsets[u]
                events. A list, or a tensor on any device; the layout lives on that device (lists: the CPU).
            chunk_size: events per chunk, k >= 1.
            summaries_per_chunk: summary tokens per closed chunk, m >= 0; 0 means there are none.
            window_chunks: chunks before its own that an event still sees as events, W >= 0; None is infinite.
            max_visible_chunks: chunks before the window that are seen as summaries, V >= 0; None is all of them.
            query_start: [U] first event of each history that asks (default 0).
            key_start: [U] first event of each history whose key and value are given (default 0): a chunk start, no
                later than the first chunk that the window of query_start's chunk reaches.
            unseen_summaries: whether there are summaries of the chunks W and fewer before the last event's, too, which
                no event of these histories sees. Later events will: a state needs them, training does not.

        Raises:
            ShapeError: one of these is violated; the message names the argument, the user and both values.
        """
        _check_at_least("chunk_size", chunk_size, 1)
        _check_at_least("summaries_per_chunk", summaries_per_chunk, 0)
        _check_at_least("window_chunks", window_chunks, 0)
        _check_at_least("max_visible_chunks", max_visible_chunks, 0)
        device = offsets.device if isinstance(offsets, Tensor) else torch.device("cpu")
        lengths = _lengths(_integers("offsets", offsets))
        starts = _starts("query_start", query_start, len(lengths))
        key_starts = _starts("key_start", key_start, len(lengths))
        spans = tuple(
            _span(user, n, start, key, chunk_size, window_chunks, max_visible_chunks, unseen_summaries)
            for user, (n, start, key) in enumerate(zip(lengths, starts, key_starts))
        )
        return ChunkLayout(spans, chunk_size, summaries_per_chunk, window_chunks, max_visible_chunks, device)

    def to(self, device: torch.device | str) -> ChunkLayout:
        """Return the same layout with its tensors on `device`."""
        device = torch.device(device)
        return self if device == self.device else replace(self, device=device, plans={})

    @property
    def num_users(self) -> int:
        """Histories in the batch, U."""
        return len(self.spans)

    @cached_property
    def num_query_events(self) -> int:
        """Rows of events.query."""
        return sum(span.num_query_events for span in self.spans)

    @cached_property
    def num_key_events(self) -> int:
        """Rows of events.key and events.value."""
        return sum(span.num_key_events for span in self.spans)

    @cached_property
    def num_query_summaries(self) -> int:
        """Rows of summaries.query."""
        return self.summaries_per_chunk * sum(span.num_query_chunks for span in self.spans)

    @cached_property
    def num_key_summaries(self) -> int:
        """Rows of summaries.key and summaries.value."""
        return self.summaries_per_chunk * sum(span.num_key_chunks for span in self.spans)

    @cached_property
    def event_query_offsets(self) -> Tensor:
        """Rows of events.query by user: int64 [U + 1]."""
        return self._offsets([span.num_query_events for span in self.spans])

    @cached_property
    def event_key_offsets(self) -> Tensor:
        """Rows of events.key by user: int64 [U + 1]."""
        return self._offsets([span.num_key_events for span in self.spans])

    @cached_property
    def summary_query_offsets(self) -> Tensor:
        """Rows of summaries.query by user: int64 [U + 1]."""
        return self._offsets([span.num_query_chunks * self.summaries_per_chunk for span in self.spans])

    @cached_property
    def summary_key_offsets(self) -> Tensor:
        """Rows of summaries.key by user: int64 [U + 1]."""
        return self._offsets([span.num_key_chunks * self.summaries_per_chunk for span in self.spans])

    @cached_property
    def event_query_index(self) -> Tensor:
        """Index within its whole history of each row of events.query: int64 [num_query_events]."""
        return self._ranges([(span.query_start, span.num_events) for span in self.spans])

    @cached_property
    def event_key_index(self) -> Tensor:
        """Index within its whole history of each row of events.key: int64 [num_key_events]."""
        return self._ranges([(span.key_start, span.num_events) for span in self.spans])

    @cached_property
    def summary_query_chunk(self) -> Tensor:
        """Chunk of each row of summaries.query: int64 [num_query_summaries]."""
        return self._by_slot(self._query_chunks)

    @cached_property
    def summary_query_slot(self) -> Tensor:
        """Slot 0..m-1 within its chunk of each row of summaries.query: int64 [num_query_summaries]."""
        return self._slots(self.num_query_summaries)

    @cached_property
    def summary_key_chunk(self) -> Tensor:
        """Chunk of each row of summaries.key: int64 [num_key_summaries]."""
        return self._by_slot(self._ranges([(span.first_key_chunk, span.num_summarised) for span in self.spans]))

    @cached_property
    def summary_key_slot(self) -> Tensor:
        """Slot 0..m-1 within its chunk of each row of summaries.key: int64 [num_key_summaries]."""
        return self._slots(self.num_key_summaries)

    @property
    def _query_chunks(self) -> Tensor:
        return self._ranges(
            [(span.first_query_chunk, span.first_query_chunk + span.num_query_chunks) for span in self.spans]
        )

    def _offsets(self, counts: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int64).to(self.device)

    def _ranges(self, bounds: list[tuple[int, int]]) -> Tensor:
        """Concatenate the ranges first..stop-1."""
        parts = [torch.arange(first, stop) for first, stop in bounds if stop > first]
        if not parts:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self.device)

    def _by_slot(self, chunks: Tensor) -> Tensor:
        return chunks.repeat_interleave(self.summaries_per_chunk)

    def _slots(self, num_rows: int) -> Tensor:
        return torch.arange(num_rows, device=self.device) % max(self.summaries_per_chunk, 1)


def _check_at_least(name: str, value: int | None, smallest: int) -> None:
    if value is not None and value < smallest:
        raise ShapeError(f"{name} must be at least {smallest}: got {value}.")


def _integers(name: str, values: Integers) -> list[int]:
    if not isinstance(values, Tensor):
        return [int(value) for value in values]
    if values.dim() != 1 or values.dtype.is_floating_point or values.dtype.is_complex or values.dtype is torch.bool:
        raise ShapeError(f"{name} must be a 1-d tensor of integers: got {values.dtype} of shape {list(values.shape)}.")
    return cast(list[int], values.tolist())  # pyright: ignore[reportUnknownMemberType]


def _lengths(offsets: list[int]) -> list[int]:
    if not offsets or offsets[0] != 0:
        raise ShapeError(f"offsets must start with 0 and have one more entry than users: got {offsets[:4]}.")
    lengths = [stop - start for start, stop in pairwise(offsets)]
    if lengths and min(lengths) < 0:
        user = next(u for u, length in enumerate(lengths) if length < 0)
        raise ShapeError(f"offsets must not decrease: user {user} has {offsets[user]} then {offsets[user + 1]}.")
    return lengths


def _starts(name: str, values: Integers | None, num_users: int) -> list[int]:
    starts = [0] * num_users if values is None else _integers(name, values)
    if len(starts) != num_users:
        raise ShapeError(f"{name} must have one entry a user: expected {num_users}, got {len(starts)}.")
    return starts


def _span(
    user: int, n: int, start: int, key: int, k: int, window: int | None, visible: int | None, unseen_summaries: bool
) -> UserSpan:
    if not 0 <= start <= n:
        raise ShapeError(f"query_start[{user}] must lie in 0..{n}, the history's length: got {start}.")
    chunk = start // k
    latest_key = 0 if window is None else max(0, chunk - window) * k
    if key % k or not 0 <= key <= latest_key:
        raise ShapeError(
            f"key_start[{user}] must be a multiple of chunk_size {k} in 0..{latest_key} "
            f"(query_start is {start}, window_chunks {window}): got {key}."
        )
    first_summary = 0 if visible is None or window is None else max(0, chunk - window - visible)
    num_summarised = n // k
    if not unseen_summaries:
        num_summarised = 0 if window is None else max(0, (n - 1) // k - window)
    return UserSpan(n, start, key, chunk, first_summary, num_summarised)
