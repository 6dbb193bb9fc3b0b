"""A few queries on long states: slices of keys and values instead of blocks, masks only where rows differ.

Everything a chunk's events see is one range of event rows and one range of summary rows, so one new event costs one
small product of matrices and no mask. Plain autograd where gradients are wanted; what it keeps is linear in the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ksa_kernels.layout import ChunkLayout
from ksa_kernels.summary_attention import fused_cpu

if TYPE_CHECKING:
    from ksa_kernels.summary_attention.api import QKV

MAX_PIECES = 4
"""Pieces (chunks of users) up to which going one by one is faster than building blocks."""


class Piece(NamedTuple):
    """Queries that see one range of event rows and one of summary rows; each range is (first, stop).

    The last keys of the queries' own kind are the queries' own, and causal.
    """

    are_events: bool
    query: tuple[int, int]
    events: tuple[int, int]
    summaries: tuple[int, int]


def is_small(layout: ChunkLayout) -> bool:
    """Whether the layout's queries touch at most MAX_PIECES chunks in all."""
    pieces = 0
    for span in layout.spans:
        if span.num_query_events:
            pieces += (span.num_events - 1) // layout.chunk_size - span.first_query_chunk + 1
        if pieces > MAX_PIECES:
            return False
    return True


def attend(events: QKV, summaries: QKV, layout: ChunkLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return events [Tq, H, D], summaries [Sq, H, D] and their log-sum-exps [Tq, H], [Sq, H]."""
    pieces = layout.plans.get("small")
    if pieces is None:
        pieces = layout.plans["small"] = list(_pieces(layout))
    found = [_attend(piece, events, summaries) for piece in pieces]
    event_parts = [part for piece, part in zip(pieces, found) if piece.are_events]
    summary_parts = [part for piece, part in zip(pieces, found) if not piece.are_events]
    events_out, events_lse = _join(event_parts, events.query)
    summaries_out, summaries_lse = _join(summary_parts, summaries.query)
    return events_out, summaries_out, events_lse, summaries_lse


def _pieces(layout: ChunkLayout) -> Iterator[Piece]:
    k, m = layout.chunk_size, layout.summaries_per_chunk
    row = event_row = summary_query_row = summary_row = 0
    for span in layout.spans:
        key_shift = event_row - span.key_start
        summary_shift = summary_row - span.first_key_chunk * m
        event = span.query_start
        while event < span.num_events:
            chunk = event // k
            stop = min((chunk + 1) * k, span.num_events)
            first, old = _ranges(chunk, layout)
            yield Piece(
                True,
                (row, row + stop - event),
                (first + key_shift, stop + key_shift),
                (old[0] + summary_shift, old[1] + summary_shift),
            )
            if stop == (chunk + 1) * k and m:
                yield Piece(
                    False,
                    (summary_query_row, summary_query_row + m),
                    (chunk * k + key_shift, stop + key_shift),
                    (chunk * m + summary_shift, (chunk + 1) * m + summary_shift),
                )
                summary_query_row += m
            row, event = row + stop - event, stop
        event_row += span.num_key_events
        summary_row += span.num_key_chunks * m


def _ranges(chunk: int, layout: ChunkLayout) -> tuple[int, tuple[int, int]]:
    """Return the first event that a chunk's events see, and the range of summaries that they see."""
    if layout.window_chunks is None:
        return 0, (0, 0)
    before = max(0, chunk - layout.window_chunks)
    first = 0 if layout.max_visible_chunks is None else max(0, before - layout.max_visible_chunks)
    m = layout.summaries_per_chunk
    return before * layout.chunk_size, (first * m, before * m)


def _attend(piece: Piece, events: QKV, summaries: QKV) -> tuple[Tensor, Tensor]:
    """Return out [rows, H, D] in the queries' dtype and lse [rows, H]."""
    query = _rows((events if piece.are_events else summaries).query, piece.query)
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = events.key.shape[1]
    key, value = _rows(events.key, piece.events), _rows(events.value, piece.events)
    if piece.summaries[0] < piece.summaries[1]:
        old_key, old_value = _rows(summaries.key, piece.summaries), _rows(summaries.value, piece.summaries)
        if num_rows == 1 and _follow(key, old_key) and _follow(value, old_value):
            key, value = _joined(key, old_key), _joined(value, old_value)
        else:
            order = 1 if piece.are_events else -1  # what is causal goes last
            key, value = torch.cat((old_key, key)[::order]), torch.cat((old_value, value)[::order])
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    q = _by_key_head(query, num_kv_heads).to(dtype)
    key, value = key.to(dtype).transpose(0, 1), value.to(dtype).transpose(0, 1)
    bias = _hide_later(num_rows, q.shape[1], key) if num_rows > 1 else None
    if query.device.type == "cpu" and not (torch.is_grad_enabled() and _any_needs_grad(q, key, value)):
        out, lse = fused_cpu.attend_rows(q, key, value, bias)
    else:
        scores = q @ key.mT * head_dim**-0.5
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ value
    if num_rows == 1:
        return out.reshape(query.shape).to(query.dtype), lse.reshape(1, num_heads)
    out = out.reshape(num_kv_heads, num_rows, -1, head_dim).transpose(0, 1).reshape(query.shape)
    lse = lse.reshape(num_kv_heads, num_rows, -1).transpose(0, 1).reshape(num_rows, num_heads)
    return out.to(query.dtype), lse


def _by_key_head(query: Tensor, num_kv_heads: int) -> Tensor:
    """Return queries [rows, H, D] as [J, rows * G, D], the G query heads of a key head side by side."""
    num_rows, _, head_dim = query.shape
    if num_rows == 1:
        return query.view(num_kv_heads, -1, head_dim)
    return query.view(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)


def _rows(whole: Tensor, bounds: tuple[int, int]) -> Tensor:
    return whole if bounds == (0, whole.shape[0]) else whole[bounds[0] : bounds[1]]


def _follow(first: Tensor, second: Tensor) -> bool:
    """Whether the rows of `second` lie in memory right behind those of `first`, and no gradient is wanted."""
    return (
        not torch.is_grad_enabled()
        and first.stride() == second.stride()
        and first.data_ptr() + first.shape[0] * first.stride(0) * first.element_size() == second.data_ptr()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    )


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Return a view over both; see `_follow`."""
    return first.as_strided((first.shape[0] + second.shape[0], *first.shape[1:]), first.stride())


def _any_needs_grad(*tensors: Tensor) -> bool:
    return any(each.requires_grad for each in tensors)


def _hide_later(count: int, num_rows: int, key: Tensor) -> Tensor:
    """Return a bias that hides from each of `count` rows the keys that come after it among the last `count` ones.

    Shape [num_rows, keys]: a group's heads repeat each row.
    """
    bias = key.new_zeros(count, key.shape[1])
    bias[:, -count:] = torch.full((count, count), -torch.inf, dtype=key.dtype, device=key.device).triu_(1)
    return bias.repeat_interleave(num_rows // count, 0)


def _join(parts: list[tuple[Tensor, Tensor]], query: Tensor) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return query, query[:, :, 0].to(torch.float64 if query.dtype is torch.float64 else torch.float32)
    out, lse = zip(*parts)
    return torch.cat(out), torch.cat(lse)
