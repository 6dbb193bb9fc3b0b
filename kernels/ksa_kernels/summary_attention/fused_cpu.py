"""PyTorch's fused attention for CPUs, with the log-sum-exp that its public function hides, and the dense route.

`scaled_dot_product_attention` on a CPU dispatches to the two operators called here; only they return (and take back)
the log-sum-exp. They run in blocks of their own and keep nothing quadratic.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksa_kernels.layout import ChunkLayout

if TYPE_CHECKING:
    from ksa_kernels.summary_attention.api import QKV

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_rows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out [H, Q, D] and lse [H, Q] of query [H, Q, D] over key, value [H, L, D] and a bias [Q, L]."""
    mask = None if bias is None else bias[None, None]
    out, lse = _FORWARD(query[None], key[None], value[None], 0.0, False, attn_mask=mask)
    return out[0], lse[0]


def is_dense(layout: ChunkLayout) -> bool:
    """Whether this layout is plain causal attention of whole histories, without summaries."""
    if layout.summaries_per_chunk or any(span.query_start for span in layout.spans):
        return False
    longest = max((span.num_events for span in layout.spans), default=0)
    return layout.window_chunks is None or longest <= (layout.window_chunks + 1) * layout.chunk_size


def attend_dense(events: QKV, summaries: QKV, layout: ChunkLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return events [T, H, D] and lse [T, H] of causal attention, user by user; the (no) summaries as they are."""
    out, lse = _Dense.apply(tuple(layout.event_query_offsets.tolist()), *events)  # pyright: ignore
    return out, summaries.query, lse, summaries.query[:, :, 0].to(lse.dtype)


class _Dense(torch.autograd.Function):
    """out [T, H, D], lse [T, H] from (offsets, q, k, v)."""

    @staticmethod
    def forward(ctx: Any, offsets: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:2], dtype=dtype)
        for start, stop in pairwise(offsets):
            if stop > start:
                q, k, v = (_heads(each[start:stop], query.shape[1], dtype) for each in (query, key, value))
                out_, lse_ = _FORWARD(q, k, v, 0.0, True)
                out[start:stop] = out_[0].transpose(0, 1)
                lse[start:stop] = lse_[0].T
        ctx.offsets = offsets
        ctx.save_for_backward(query, key, value, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        d_out, d_lse = grads
        query, key, value, out, lse = ctx.saved_tensors
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        d_out = torch.zeros_like(out) if d_out is None else d_out
        for start, stop in pairwise(ctx.offsets):
            if stop == start:
                continue
            here = slice(start, stop)
            q, k, v, o, do = (_heads(each[here], num_heads, lse.dtype) for each in (query, key, value, out, d_out))
            lse_ = lse[here].T[None].contiguous()
            dq, dk, dv = _BACKWARD(do, q, k, v, o, lse_, 0.0, True)
            if d_lse is not None:
                more_q, more_k = _through_lse(q, k, lse_, d_lse[here].T[None])
                dq, dk = dq + more_q, dk + more_k
            d_query[here] = dq[0].transpose(0, 1)
            for whole, part in ((d_key, dk), (d_value, dv)):
                whole[here] = part[0].transpose(0, 1).unflatten(1, (num_kv_heads, -1)).sum(2)
        return None, d_query, d_key, d_value


def _heads(rows: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """View [rows, H or J, D] as [1, H, rows, D] in `dtype`, each key head repeated for its query heads."""
    if rows.shape[1] != num_heads:
        rows = rows.repeat_interleave(num_heads // rows.shape[1], 1)
    return rows.to(dtype).transpose(0, 1)[None]


def _through_lse(q: Tensor, k: Tensor, lse: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the log-sum-exp's gradient adds to those of q and k (rarely asked for: a block of rows at a time)."""
    scale, more_q, more_k = q.shape[-1] ** -0.5, torch.zeros_like(q), torch.zeros_like(k)
    for start in range(0, q.shape[2], 64):
        rows = slice(start, min(start + 64, q.shape[2]))
        weights = (q[:, :, rows] @ k[:, :, : rows.stop].mT * scale - lse[:, :, rows, None]).exp().tril(start)
        d_scores = weights * d_lse[:, :, rows, None] * scale
        more_q[:, :, rows] = d_scores @ k[:, :, : rows.stop]
        more_k[:, :, : rows.stop] += d_scores.mT @ q[:, :, rows]
    return more_q, more_k
