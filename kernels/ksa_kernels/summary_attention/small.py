"""A few queries on long states: slices of keys and values instead of blocks, masks only where rows differ.

Everything a chunk's events see is one range of event rows and one range of summary rows, so one new event costs one
small product of matrices and no mask. Plain autograd where gradients are wanted; what it keeps is linear in the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ksa_kernels.layout import ChunkLayout, UserSpan
from ksa_kernels.summary_attention import fused_cpu

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
    query: Tensor, events: QKV, keys: slice, summaries: QKV, old: slice, causal_events: int, causal_summaries: int
) -> tuple[Tensor, Tensor]:
    """Attend over one range of events and one of summaries; the last rows of one range may be causal.

    Returns out [rows, H, D] in the query's dtype and lse [rows, H].
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = events.key.shape[1]
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    q = query.to(dtype).view(num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    q = q.reshape(num_kv_heads, -1, head_dim)
    key, value = events.key[keys], events.value[keys]
    causal = causal_events
    if old.stop > old.start:
        # what is causal goes last
        if causal_summaries:
            causal = causal_summaries
            key, value = torch.cat([key, summaries.key[old]]), torch.cat([value, summaries.value[old]])
        else:
            key, value = torch.cat([summaries.key[old], key]), torch.cat([summaries.value[old], value])
    key, value = key.to(dtype).transpose(0, 1), value.to(dtype).transpose(0, 1)
    bias = _hide_later(causal, q.shape[1], key) if causal > 1 else None
    if query.device.type == "cpu" and not (torch.is_grad_enabled() and _any_needs_grad(q, key, value)):
        out, lse = fused_cpu.attend_rows(q, key, value, bias)
    else:
        scores = q @ key.mT * head_dim**-0.5
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ value
    out = out.reshape(num_kv_heads, -1, num_rows, head_dim).permute(2, 0, 1, 3).reshape(query.shape)
    return out.to(query.dtype), lse.reshape(num_heads, num_rows).T


def _any_needs_grad(*tensors: Tensor) -> bool:
    return any(each.requires_grad for each in tensors)


def _hide_later(count: int, num_rows: int, key: Tensor) -> Tensor:
    """Return a bias that hides from each of `count` rows the keys that come after it among the last `count` ones.

    Shape [num_rows, keys]: a group's heads repeat the rows.
    """
    bias = key.new_zeros(count, key.shape[1])
    bias[:, -count:] = torch.full((count, count), -torch.inf, dtype=key.dtype, device=key.device).triu_(1)
    return bias.repeat(num_rows // count, 1)


def _join(parts: list[tuple[Tensor, Tensor]], query: Tensor) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
        return query[:0], query[:0, :, 0].to(dtype)
    out, lse = zip(*parts)
    return torch.cat(out), torch.cat(lse)
