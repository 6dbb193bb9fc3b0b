"""Blocked PyTorch: any device, memory linear in the length, forward and backward.

A *block* is a few neighbouring chunks of one user. Its queries are their events and their summaries; its keys are

    window events, own events | old summaries | edge summaries | own summaries

Every event of the block sees the old summaries (of chunks before the window of the block's first chunk), some see the
edge ones; the own ones are for the block's summary queries. Counted from the block's first chunk, who sees whom is the
same in every block of one size, so one additive bias serves them all; a token that a history does not have reads a row
of zeros. Blocks of one (rounded) size run together as batched matrix products, a bounded number at a time. The backward
pass computes each block's probabilities again from q, k and the log-sum-exp, so nothing quadratic is kept.

A few queries on a long state take a shorter way (`small.py`).

Letters: H heads, J key heads, G = H / J, D head dim, n blocks, Q query rows of a block, L key rows of a block.
Inside, scores are in base 2: q is scaled by log2(e) D**-0.5 (torch's exp is 15 times slower on hidden keys than exp2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import log, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ksa_kernels.layout import ChunkLayout
from ksa_kernels.summary_attention import fused_cpu, small
from ksa_kernels.summary_attention.reference import Tokens, visible

if TYPE_CHECKING:
    from ksa_kernels.summary_attention.api import QKV

BLOCK_ROWS = 64
"""Event queries of a full block (one chunk, where chunks are longer)."""
SCORES_AT_ONCE = 1 << 18
"""Scores worked on together on a CPU: few enough for a core's cache, enough to hide Python."""
SCORES_ON_DEVICE = 1 << 25
"""The same elsewhere (128 MB of float32): pieces sized for a cache left a GPU waiting for Python, 4 times slower."""
MOST_KEPT = 1 << 22
"""Entries of bias up to which a plan keeps them (16 MB)."""
HIDDEN = -1e30
"""Bias of a key that a query does not see: finite, so that rows of padding stay finite too."""


def attend(events: QKV, summaries: QKV, layout: ChunkLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return events [Tq, H, D], summaries [Sq, H, D] and their log-sum-exps [Tq, H], [Sq, H]."""
    if (pieces := small.plan(layout)) is not None:
        return small.attend(events, summaries, pieces)
    if events.query.device.type == "cpu" and fused_cpu.is_dense(layout):
        return fused_cpu.attend_dense(events, summaries, layout)
    plan = layout.plans.get("torch")
    if plan is None:
        plan = layout.plans["torch"] = Plan.of(layout)
    return _Blocked.apply(plan, *events, *summaries)  # pyright: ignore[reportReturnType]


class Size(NamedTuple):
    """The shape of a block, in chunks."""

    own: int
    window: int
    old: int
    edge: int


@dataclass(frozen=True)
class Group:
    """Blocks of one size: bias [Q, L]; first chunk and user, one entry a block."""

    size: Size
    bias: Tensor
    first_chunk: Tensor
    user: Tensor


class Side(NamedTuple):
    """Where one kind of token of each user is: tokens first..stop-1 are rows first+shift..stop+shift-1."""

    first: Tensor
    stop: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Plan:
    """All blocks of a layout. Rows of events and of summaries are numbered together, events first."""

    layout: ChunkLayout
    groups: tuple[Group, ...]
    event_query: Side
    summary_query: Side
    event_key: Side
    summary_key: Side
    kept: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    """Pieces of small layouts, by number of heads: each layer, forward and backward, wants the same."""

    @staticmethod
    def of(layout: ChunkLayout) -> Plan:
        """Cut the layout's queries into blocks and group them by size."""
        m = layout.summaries_per_chunk
        table = torch.tensor(layout.spans, dtype=torch.int64).reshape(-1, 6).to(layout.device)
        n, query_start, key_start, query_chunk, key_chunk, summarised = table.unbind(1)

        def side(first: Tensor, stop: Tensor, offsets: Tensor, rows_before: int) -> Side:
            return Side(first, stop, offsets[:-1] + rows_before - first)

        return Plan(
            layout,
            tuple(_groups(layout)),
            side(query_start, n, layout.event_query_offsets, 0),
            side(query_chunk * m, summarised * m, layout.summary_query_offsets, layout.num_query_events),
            side(key_start, n, layout.event_key_offsets, 0),
            side(key_chunk * m, summarised * m, layout.summary_key_offsets, layout.num_key_events),
        )

    def pieces(self, num_heads: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Return what `_pieces` yields, kept where it is small."""
        if sum(len(group.user) * group.bias.numel() for group in self.groups) > MOST_KEPT:
            return self._pieces(num_heads)
        if num_heads not in self.kept:
            self.kept[num_heads] = list(self._pieces(num_heads))
        return self.kept[num_heads]

    def _pieces(self, num_heads: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield query rows [n, Q], key rows [n, L] and bias [n, Q, L], a bounded number of blocks at a time.

        A token that does not exist has the row behind all others.
        """
        layout = self.layout
        k, m = layout.chunk_size, layout.summaries_per_chunk
        no_query = layout.num_query_events + layout.num_query_summaries
        no_key = layout.num_key_events + layout.num_key_summaries
        for group in self.groups:
            most = SCORES_AT_ONCE if layout.device.type == "cpu" else SCORES_ON_DEVICE
            size, step = group.size, max(1, most // (num_heads * group.bias.numel()))
            before = size.edge if layout.window_chunks is None else layout.window_chunks
            for start in range(0, len(group.user), step):
                user, chunk = group.user[start : start + step], group.first_chunk[start : start + step]
                query_rows = torch.cat(
                    [
                        _rows(self.event_query, user, chunk * k, size.own * k, no_query),
                        _rows(self.summary_query, user, chunk * m, size.own * m, no_query),
                    ],
                    1,
                )
                old_and_edge = (size.old + size.edge) * m
                key_rows = torch.cat(
                    [
                        _rows(self.event_key, user, (chunk - size.window) * k, (size.window + size.own) * k, no_key),
                        _rows(self.summary_key, user, (chunk - before - size.old) * m, old_and_edge, no_key),
                        _rows(self.summary_key, user, chunk * m, size.own * m, no_key),
                    ],
                    1,
                )
                missing = torch.where(key_rows == no_key, HIDDEN, 0.0).to(group.bias.dtype)
                yield query_rows, key_rows, group.bias + missing[:, None, :]


def _rows(side: Side, user: Tensor, first: Tensor, count: int, nothing: int) -> Tensor:
    """Return the rows [n, count] of each block's tokens first..first+count-1; `nothing` where there is none."""
    token = first[:, None] + torch.arange(count, device=first.device)
    exists = (token >= side.first[user, None]) & (token < side.stop[user, None])
    return torch.where(exists, token + side.shift[user, None], nothing)


def _groups(layout: ChunkLayout) -> Iterator[Group]:
    blocks: dict[Size, list[tuple[int, int]]] = {}
    # a power of two, so that a block rounded up never reaches into the next one
    own = 1 << max(0, (BLOCK_ROWS // layout.chunk_size).bit_length() - 1)
    for user, span in enumerate(layout.spans):
        if not span.num_query_events:
            continue
        last = (span.num_events - 1) // layout.chunk_size
        for chunk in range(span.first_query_chunk, last + 1, own):
            blocks.setdefault(_size(chunk, min(own, last + 1 - chunk), layout), []).append((chunk, user))
    for size, where in blocks.items():
        first_chunk, user = torch.tensor(where).to(layout.device).unbind(1)
        yield Group(size, _bias(size, layout), first_chunk, user)


def _size(chunk: int, own: int, layout: ChunkLayout) -> Size:
    """Return the size of a block's tensors, rounded up so that few sizes remain."""
    own = _round_up(own, 1)
    step = max(1, 128 // layout.chunk_size)
    if layout.window_chunks is None:
        return Size(own, _round_up(chunk, step), 0, 0)
    window = min(layout.window_chunks, _round_up(chunk, step))
    edge = min(layout.window_chunks, own - 1)
    if layout.summaries_per_chunk == 0:
        return Size(own, window, 0, 0)
    old = max(0, chunk - layout.window_chunks)
    if layout.max_visible_chunks is not None:
        old = min(old, layout.max_visible_chunks)
    return Size(own, window, _round_up(old, max(1, 32 // layout.summaries_per_chunk)), edge)


def _round_up(count: int, step: int) -> int:
    """Return the least number >= count among step * (0, 1, 2, 3, 4, 6, 8, 12, 16, ...)."""
    units = -(-count // step)
    power = 1 << (units - 1).bit_length() if units else 0
    return step * (power * 3 // 4 if units <= power * 3 // 4 else power)


def _bias(size: Size, layout: ChunkLayout) -> Tensor:
    """Return who sees whom inside a block, counted from its first chunk: [Q, L], 0 or HIDDEN."""
    k, m = layout.chunk_size, layout.summaries_per_chunk
    before = size.edge if layout.window_chunks is None else layout.window_chunks
    own = torch.arange(size.own)
    query = _tokens(torch.arange(size.own * k), own, k, m)
    remembered = torch.arange(-before - size.old, -before + size.edge)
    key = _tokens(torch.arange(-size.window * k, size.own * k), torch.cat([remembered, own]), k, m)
    seen = visible(query, key, layout.window_chunks, layout.max_visible_chunks)
    return torch.where(seen, 0.0, HIDDEN).to(layout.device)


def _tokens(event: Tensor, chunk: Tensor, k: int, m: int) -> Tokens:
    slot = torch.arange(m).repeat(len(chunk))
    is_summary = torch.arange(len(event) + len(slot)) >= len(event)
    return Tokens(is_summary, torch.cat([event // k, chunk.repeat_interleave(m)]), torch.cat([event, slot]))


class _Workspace:
    """Buffers used again from piece to piece: they stay in cache, and the allocator is left alone."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor; the last one of this name is overwritten."""
        size = prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = self.like.new_empty(size)
        return buffer[:size].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b for batches of matrices."""
        return torch.bmm(a, b, out=self(name, len(a), a.shape[1], b.shape[2]))

    def take(self, name: str, joined: Tensor, rows: Tensor) -> Tensor:
        """Gather rows [n, R] of joined [J, rows, G, D] as [J * n, R * G, D]."""
        num_heads, _, group, width = joined.shape
        taken = self(name, num_heads, rows.numel(), group, width)
        torch.index_select(joined, 1, rows.flatten(), out=taken)
        return taken.view(num_heads * len(rows), -1, width)


class _Blocked(torch.autograd.Function):
    """out, lse of events and of summaries from (plan, event q, k, v, summary q, k, v)."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, eq: Tensor, ek: Tensor, ev: Tensor, sq: Tensor, sk: Tensor, sv: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        num_kv_heads, num_heads = ek.shape[1], eq.shape[1]
        q, k, v = (_head_major(*pair, num_kv_heads) for pair in ((eq, sq), (ek, sk), (ev, sv)))
        q *= _scale(eq)
        out, lse = torch.empty_like(q), q.new_empty(*q.shape[:3], 1)
        work = _Workspace(q)
        for query_rows, key_rows, bias in plan.pieces(num_heads):
            scores = work.product("scores", work.take("q", q, query_rows), work.take("k", k, key_rows).mT)
            _by_block(scores, bias, num_kv_heads).add_(bias[:, :, None, :])
            top = scores.amax(-1, keepdim=True)
            weights = scores.sub_(top).exp2_()
            total = weights.sum(-1, keepdim=True)
            gathered = work.product("out", weights, work.take("k", v, key_rows))
            gathered /= total
            _put(out, query_rows, gathered)
            _put(lse, query_rows, top.add_(total.log2_()))
        lse[:, -1] = 0.0
        events_out, summaries_out = _split(out, len(eq), len(sq), eq.dtype)
        events_lse, summaries_lse = _split(lse * log(2), len(eq), len(sq), lse.dtype)
        ctx.plan = plan
        ctx.save_for_backward(eq[:0], q, k, v, events_out, summaries_out, lse)
        return events_out, summaries_out, events_lse[..., 0], summaries_lse[..., 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        eq, q, k, v, events_out, summaries_out, lse = ctx.saved_tensors
        num_kv_heads, num_heads, dtype = len(k), eq.shape[1], q.dtype
        d_events, d_summaries = (
            torch.zeros_like(out) if grad is None else grad
            for out, grad in zip((events_out, summaries_out), grads[:2], strict=True)
        )
        d_out = _head_major(d_events, d_summaries, num_kv_heads)
        # softmax's backward subtracts sum(d_out * out) from each row; a gradient of the log-sum-exp adds to it
        shifts = [
            (grad.to(dtype) * out.to(dtype)).sum(-1, keepdim=True) - (0.0 if d_lse is None else d_lse[..., None])
            for grad, out, d_lse in zip((d_events, d_summaries), (events_out, summaries_out), grads[2:], strict=True)
        ]
        shift = _head_major(shifts[0], shifts[1], num_kv_heads)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        work = _Workspace(q)
        for query_rows, key_rows, bias in ctx.plan.pieces(num_heads):
            q_, k_ = work.take("q", q, query_rows), work.take("k", k, key_rows)
            v_, d_out_ = work.take("v", v, key_rows), work.take("d_out", d_out, query_rows)
            scores = work.product("scores", q_, k_.mT)
            _by_block(scores, bias, num_kv_heads).add_(bias[:, :, None, :])
            weights = scores.sub_(work.take("lse", lse, query_rows)).exp2_()
            _add(dv, key_rows, work.product("key rows", weights.mT, d_out_))
            d_scores = work.product("d_scores", d_out_, v_.mT)
            d_scores.sub_(work.take("shift", shift, query_rows)).mul_(weights)
            _put(dq, query_rows, work.product("query rows", d_scores, k_))
            _add(dk, key_rows, work.product("key rows", d_scores.mT, q_))
        dq *= eq.shape[-1] ** -0.5
        dk *= log(2)  # q carries log2(e) and the scale
        layout = ctx.plan.layout
        queries = (layout.num_query_events, layout.num_query_summaries)
        keys = (layout.num_key_events, layout.num_key_summaries)
        parts = [_split(dq, *queries, eq.dtype), _split(dk, *keys, eq.dtype), _split(dv, *keys, eq.dtype)]
        return None, *(events for events, _ in parts), *(summaries for _, summaries in parts)


def _scale(query: Tensor) -> float:
    return query.shape[-1] ** -0.5 / log(2)


def _head_major(events: Tensor, summaries: Tensor, num_kv_heads: int) -> Tensor:
    """Join event and summary rows [rows, H, D] into [J, rows + 1, G, D], the last row zeros, in float32 or float64."""
    dtype = torch.float64 if events.dtype is torch.float64 else torch.float32
    count = len(events) + len(summaries)
    joined = events.new_empty(num_kv_heads, count + 1, events.shape[1] // num_kv_heads, events.shape[2], dtype=dtype)
    by_row = joined.transpose(0, 1)
    by_row[: len(events)] = events.unflatten(1, (num_kv_heads, -1))
    by_row[len(events) : count] = summaries.unflatten(1, (num_kv_heads, -1))
    by_row[count] = 0.0
    return joined


def _split(joined: Tensor, num_events: int, num_summaries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split [J, rows + 1, G, D] into [rows, H, D] for events and for summaries."""
    by_row = joined.transpose(0, 1)[: num_events + num_summaries].reshape(
        num_events + num_summaries, -1, joined.shape[3]
    )
    return by_row[:num_events].to(dtype), by_row[num_events:].to(dtype)


def _put(joined: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write values of rows that occur once; rows that do not exist all write into the row behind the others."""
    joined.index_copy_(1, rows.flatten(), values.reshape(joined.shape[0], -1, *joined.shape[2:]))


def _add(joined: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values to rows that may occur in several blocks."""
    flat = rows.flatten()
    for head, part in zip(joined, values.reshape(joined.shape[0], -1, *joined.shape[2:])):
        head.flatten(1).index_add_(0, flat, part.flatten(1))


def _by_block(scores: Tensor, bias: Tensor, num_kv_heads: int) -> Tensor:
    """View [J * n, Q * G, L] as [J, n, Q, G, L]."""
    return scores.view(num_kv_heads, len(bias), bias.shape[1], -1, bias.shape[2])
