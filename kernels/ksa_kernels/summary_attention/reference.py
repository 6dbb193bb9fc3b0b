"""The oracle: one dense boolean mask per user, plain PyTorch, any device; slow, and believed at first reading."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ksa_kernels.layout import ChunkLayout, UserSpan

if TYPE_CHECKING:
    from ksa_kernels.summary_attention.api import QKV


class Tokens(NamedTuple):
    """Who some tokens of one history are; one entry a token."""

    is_summary: Tensor
    chunk: Tensor
    place: Tensor
    """An event's index in its history; a summary's slot in its chunk."""


def attend(events: QKV, summaries: QKV, layout: ChunkLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return events [Tq, H, D], summaries [Sq, H, D] and their log-sum-exps [Tq, H], [Sq, H]."""
    users = zip(
        layout.spans,
        _rows(events.query, layout.event_query_offsets),
        _rows(events.key, layout.event_key_offsets),
        _rows(events.value, layout.event_key_offsets),
        _rows(summaries.query, layout.summary_query_offsets),
        _rows(summaries.key, layout.summary_key_offsets),
        _rows(summaries.value, layout.summary_key_offsets),
    )
    parts = [
        _attend_one(span, layout, torch.cat([eq, sq]), torch.cat([ek, sk]), torch.cat([ev, sv]))
        for span, eq, ek, ev, sq, sk, sv in users
    ]
    dtype = torch.float64 if events.query.dtype is torch.float64 else torch.float32
    empty = (
        events.query[:0],
        summaries.query[:0],
        events.query[:0, :, 0].to(dtype),
        summaries.query[:0, :, 0].to(dtype),
    )
    event_out, summary_out, event_lse, summary_lse = (torch.cat(each) for each in zip(empty, *parts))
    return event_out, summary_out, event_lse, summary_lse


def visible(query: Tokens, key: Tokens, window_chunks: int | None, max_visible_chunks: int | None) -> Tensor:
    """Return whether each query sees each key: bool [queries, keys]."""
    q_summary, q_chunk, q_place = (each[:, None] for each in query)
    k_summary, k_chunk, k_place = (each[None, :] for each in key)
    chunks_ago = q_chunk - k_chunk
    in_window = (
        chunks_ago <= window_chunks if window_chunks is not None else torch.ones_like(chunks_ago, dtype=torch.bool)
    )
    remembered = ~in_window
    if window_chunks is not None and max_visible_chunks is not None:
        remembered = remembered & (chunks_ago <= window_chunks + max_visible_chunks)
    event_sees_event = in_window & (k_place <= q_place)
    summary_sees_summary = (chunks_ago == 0) & (k_place <= q_place)
    event_sees = torch.where(k_summary, remembered, event_sees_event)
    summary_sees = torch.where(k_summary, summary_sees_summary, chunks_ago == 0)
    return torch.where(q_summary, summary_sees, event_sees)


def _attend_one(
    span: UserSpan, layout: ChunkLayout, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    asking, given = _query_tokens(span, layout), _key_tokens(span, layout)
    mask = visible(asking, given, layout.window_chunks, layout.max_visible_chunks).to(query.device)
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    q, k, v = (each.to(dtype).transpose(0, 1) for each in (query, key, value))
    heads_per_key = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(heads_per_key, 0), v.repeat_interleave(heads_per_key, 0)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    out = ((scores - lse[..., None]).exp() @ v).transpose(0, 1).to(query.dtype)
    n = span.num_query_events
    return out[:n], out[n:], lse.T[:n], lse.T[n:]


def _query_tokens(span: UserSpan, layout: ChunkLayout) -> Tokens:
    first = span.first_query_chunk
    return _tokens(span.query_start, span.num_events, first, first + span.num_query_chunks, layout)


def _key_tokens(span: UserSpan, layout: ChunkLayout) -> Tokens:
    return _tokens(span.key_start, span.num_events, span.first_key_chunk, span.num_summarised, layout)


def _tokens(first_event: int, stop_event: int, first_chunk: int, stop_chunk: int, layout: ChunkLayout) -> Tokens:
    event = torch.arange(first_event, stop_event)
    m = layout.summaries_per_chunk
    chunk = torch.arange(first_chunk, max(first_chunk, stop_chunk)).repeat_interleave(m)
    slot = torch.arange(m).repeat(max(0, stop_chunk - first_chunk))
    is_summary = torch.arange(len(event) + len(chunk)) >= len(event)
    return Tokens(is_summary, torch.cat([event // layout.chunk_size, chunk]), torch.cat([event, slot]))


def _rows(values: Tensor, offsets: Tensor) -> list[Tensor]:
    bounds = offsets.tolist()
    return [values[start:stop] for start, stop in itertools.pairwise(bounds)]
