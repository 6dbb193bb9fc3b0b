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


def plan(layout: ChunkLayout) -> list[Piece] | None:
    """Return what the layout's queries see, piece by piece; None if they touch more than MAX_PIECES chunks."""
    if "small" not in layout.plans:
        layout.plans["small"] = list(_pieces(layout)) if _is_small(layout) else None
    return layout.plans["small"]


def _is_small(layout: ChunkLayout) -> bool:
    pieces = 0
    for span in layout.spans:
        if span.num_query_events:
            pieces += (span.num_events - 1) // layout.chunk_size - span.first_query_chunk + 1
        if pieces > MAX_PIECES:
            return False
    return True


def attend(events: QKV, summaries: QKV, pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return events [Tq, H, D], summaries [Sq, H, D] and their log-sum-exps [Tq, H], [Sq, H]."""
    if len(pieces) == 1:  # no chunk is closed: no summary asks
        out, lse = _attend(pieces[0], events, summaries)
        return out, summaries.query, lse, lse[:0]
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
            if stop == (chunk + 1) * k and m and chunk < span.num_summarised:
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
    key = _seen(events.key, summaries.key, piece, num_rows)
    value = _seen(events.value, summaries.value, piece, num_rows)
    q = _by_key_head(query, num_kv_heads)
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    if query.dtype is not dtype:
        q, key, value = q.to(dtype), key.to(dtype), value.to(dtype)
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    bias = _hide_later(num_rows, q.shape[1], key) if num_rows > 1 else None
    if query.device.type == "cpu" and not (torch.is_grad_enabled() and _any_needs_grad(q, key, value)):
        out, lse = fused_cpu.attend_rows(q, key, value, bias)
    else:
        scores = q @ key.mT * head_dim**-0.5
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ value
    if num_rows == 1:
        out, lse = out.reshape(query.shape), lse.reshape(1, num_heads)
    else:
        out = out.reshape(num_kv_heads, num_rows, -1, head_dim).transpose(0, 1).reshape(query.shape)
        lse = lse.reshape(num_kv_heads, num_rows, -1).transpose(0, 1).reshape(num_rows, num_heads)
    return out if query.dtype is dtype else out.to(query.dtype), lse


def _seen(events: Tensor, summaries: Tensor, piece: Piece, num_rows: int) -> Tensor:
    """Return the keys (or values) a piece sees, [L, J, D]; what is causal among several rows goes last."""
    (first, stop), (old, old_stop) = piece.events, piece.summaries
    if old == old_stop:
        return _rows(events, piece.events)
    if num_rows == 1 and old == 0 and stop == events.shape[0] and _follow(events, summaries):
        where = events.storage_offset() + first * events.stride(0)
        return events.as_strided((stop - first + old_stop, *events.shape[1:]), events.stride(), where)
    parts = _rows(summaries, piece.summaries), _rows(events, piece.events)
    return torch.cat(parts if piece.are_events else parts[::-1])


def _follow(first: Tensor, second: Tensor) -> bool:
    """Whether the rows of `second` lie in memory right behind those of `first`, and no gradient is wanted."""
    return (
        not torch.is_grad_enabled()
        and first.data_ptr() + first.shape[0] * first.stride(0) * first.element_size() == second.data_ptr()
        and first.stride() == second.stride()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    )


def _by_key_head(query: Tensor, num_kv_heads: int) -> Tensor:
    """Return queries [rows, H, D] as [J, rows * G, D], the G query heads of a key head side by side."""
    num_rows, _, head_dim = query.shape
    if num_rows == 1:
        return query.view(num_kv_heads, -1, head_dim)
    return query.view(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)


def _rows(whole: Tensor, bounds: tuple[int, int]) -> Tensor:
    return whole if bounds == (0, whole.shape[0]) else whole[bounds[0] : bounds[1]]


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
