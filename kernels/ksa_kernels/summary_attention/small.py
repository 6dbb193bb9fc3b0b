"""
A few queries on long states: slices of keys and values instead of blocks, masks only where rows differ.

Everything a chunk's events see is one range of event rows and one range of summary rows, so one new event costs two
small matrix products and no mask. Plain autograd; what it keeps is linear in the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ksa_kernels.layout import ChunkLayout, UserSpan

if TYPE_CHECKING:
    from ksa_kernels.summary_attention.api import QKV

MAX_PIECES = 4
"""Pieces (chunks of users) up to which going one by one is faster than building blocks."""


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
    event_parts: list[tuple[Tensor, Tensor]] = []
    summary_parts: list[tuple[Tensor, Tensor]] = []
    row = event_row = summary_query_row = summary_row = 0
    m = layout.summaries_per_chunk
    for span in layout.spans:
        key_shift = event_row - span.key_start
        summary_shift = summary_row - span.first_key_chunk * m
        event = span.query_start
        while event < span.num_events:
            chunk = event // layout.chunk_size
            stop = min((chunk + 1) * layout.chunk_size, span.num_events)
            count = stop - event
            first, old = _ranges(chunk, layout, span)
            keys = slice(first + key_shift, stop + key_shift)
            remembered = slice(old[0] + summary_shift, old[1] + summary_shift)
            event_parts.append(_attend(events.query[row : row + count], events, keys, summaries, remembered, count, 0))
            if stop == (chunk + 1) * layout.chunk_size and m:
                keys = slice(chunk * layout.chunk_size + key_shift, stop + key_shift)
                own = slice(chunk * m + summary_shift, (chunk + 1) * m + summary_shift)
                asking = summaries.query[summary_query_row : summary_query_row + m]
                summary_parts.append(_attend(asking, events, keys, summaries, own, 0, m))
                summary_query_row += m
            row, event = row + count, stop
        event_row += span.num_key_events
        summary_row += span.num_key_chunks * m
    events_out, events_lse = _join(event_parts, events.query)
    summaries_out, summaries_lse = _join(summary_parts, summaries.query)
    return events_out, summaries_out, events_lse, summaries_lse


def _ranges(chunk: int, layout: ChunkLayout, span: UserSpan) -> tuple[int, tuple[int, int]]:
    """Return the first event that a chunk's events see, and the range of summaries that they see."""
    if layout.window_chunks is None:
        return 0, (0, 0)
    before = max(0, chunk - layout.window_chunks)
    first = 0 if layout.max_visible_chunks is None else max(0, before - layout.max_visible_chunks)
    m = layout.summaries_per_chunk
    return before * layout.chunk_size, (first * m, before * m)


def _attend(
    query: Tensor,
    events: QKV,
    keys: slice,
    summaries: QKV,
    remembered: slice,
    causal_events: int,
    causal_summaries: int,
) -> tuple[Tensor, Tensor]:
    """
    Attend over one range of events and one of summaries; the last rows of one range may be causal.

    Returns out [rows, H, D] in the query's dtype and lse [rows, H].
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = events.key.shape[1]
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    q = query.to(dtype).view(num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3) * head_dim**-0.5
    q = q.reshape(num_kv_heads, -1, head_dim)
    has_summaries = remembered.stop > remembered.start
    scores = q @ events.key[keys].to(dtype).permute(1, 2, 0)
    if causal_events > 1:
        scores = _hide_later(scores, causal_events)
    num_events = scores.shape[-1]
    if has_summaries:
        more = q @ summaries.key[remembered].to(dtype).permute(1, 2, 0)
        scores = torch.cat([scores, _hide_later(more, causal_summaries) if causal_summaries > 1 else more], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    out = weights[..., :num_events] @ events.value[keys].to(dtype).transpose(0, 1)
    if has_summaries:
        out = out + weights[..., num_events:] @ summaries.value[remembered].to(dtype).transpose(0, 1)
    out = out.view(num_kv_heads, -1, num_rows, head_dim).permute(2, 0, 1, 3).reshape(query.shape)
    return out.to(query.dtype), lse.view(num_heads, num_rows).T


def _hide_later(scores: Tensor, count: int) -> Tensor:
    """Hide from each of `count` rows (a group's heads repeat them) the last columns that come after it."""
    later = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
    by_row = scores.unflatten(1, (-1, count))
    return torch.cat([by_row[..., :-count], by_row[..., -count:].masked_fill(later, -torch.inf)], -1).flatten(1, 2)


def _join(parts: list[tuple[Tensor, Tensor]], query: Tensor) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
        return query[:0], query[:0, :, 0].to(dtype)
    out, lse = zip(*parts)
    return torch.cat(out), torch.cat(lse)
