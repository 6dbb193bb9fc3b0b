"""summary_attention: what it takes, what it refuses, which implementation runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ksa_kernels.errors import ShapeError
from ksa_kernels.impl import Impl, resolve
from ksa_kernels.layout import ChunkLayout

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_HEAD_DIMS = (16, 32, 64, 128)


class QKV(NamedTuple):
    """Queries [rows, H, D], keys and values [rows, H_kv, D] of one kind of token."""

    query: Tensor
    key: Tensor
    value: Tensor


class AttentionOutput(NamedTuple):
    """What each query gathered, and the log of the sum its softmax divided by."""

    events: Tensor
    """[Tq, H, D] in the queries' dtype."""
    summaries: Tensor
    """[Sq, H, D] in the queries' dtype."""
    events_lse: Tensor
    """[Tq, H] natural log-sum-exp of the scaled scores; float32 (float64 for float64 queries)."""
    summaries_lse: Tensor
    """[Sq, H], likewise."""


def summary_attention(
    events: QKV, summaries: QKV | None, layout: ChunkLayout, *, impl: str = "auto"
) -> AttentionOutput:
    """Attend from each event to its window and to older chunks' summaries, from each summary to its own chunk.

    Scores are scaled by D**-0.5; the softmax runs in float32 (float64 for float64). Query heads h of
    H share the key head h // (H / H_kv).

    Args:
        events: query [Tq, H, D]; key, value [Tk, H_kv, D], of one floating dtype and contiguous in D.
        summaries: the same with Sq and Sk summary tokens; may be None where the layout has no summaries.
        layout: which user, chunk and slot each row belongs to; built once a batch, on the tensors' device.
        impl: "auto" (Triton on CUDA, else "torch"), "reference", "torch" or "triton".

    Returns:
        Outputs and log-sum-exps of event and summary queries; both can be differentiated.

    Raises:
        ShapeError: a tensor disagrees with the layout or with the other tensors.
        ImplUnavailableError: this device cannot run `impl`; nothing falls back silently.
    Source: Kwai Summary Attention, arXiv:2604.24432; visibility rule in kernels/README.md.
    """
    if summaries is None:
        summaries = _no_summaries(events)
    _check(events, summaries, layout)
    head_dim = events.query.shape[2]
    unfit = "" if head_dim in TRITON_HEAD_DIMS else f"its kernels take head dims {TRITON_HEAD_DIMS}, got {head_dim}"
    chosen = resolve(impl, events.query.device, events.query.dtype, unfit)
    if chosen is Impl.REFERENCE:
        from ksa_kernels.summary_attention.reference import attend
    elif chosen is Impl.TRITON:
        from ksa_kernels.summary_attention.triton_op import attend
    else:
        from ksa_kernels.summary_attention.torch_blocked import attend
    return AttentionOutput(*attend(events, summaries, layout))


def _no_summaries(events: QKV) -> QKV:
    return QKV(*(each.new_empty(0, *each.shape[1:]) for each in events))


def _check(events: QKV, summaries: QKV, layout: ChunkLayout) -> None:
    query = events.query
    if query.dtype not in DTYPES:
        raise ShapeError(f"events.query must be float16, bfloat16, float32 or float64: got {query.dtype}.")
    if query.dim() != 3:
        raise ShapeError(f"events.query must be [rows, H, D]: got shape {list(query.shape)}.")
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = events.key.shape[1] if events.key.dim() == 3 else 0
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ShapeError(
            f"events.key must be [rows, H_kv, D] with H_kv a divisor of events.query's H = {num_heads}: "
            f"got shape {list(events.key.shape)}."
        )
    event_rows = layout.num_query_events, layout.num_key_events
    summary_rows = layout.num_query_summaries, layout.num_key_summaries
    for kind, qkv, (query_rows, key_rows) in (("events", events, event_rows), ("summaries", summaries, summary_rows)):
        key_shape = key_rows, num_kv_heads, head_dim
        _check_tensor(kind, "query", qkv.query, (query_rows, num_heads, head_dim), query, layout)
        _check_tensor(kind, "key", qkv.key, key_shape, query, layout)
        _check_tensor(kind, "value", qkv.value, key_shape, query, layout)


def _check_tensor(
    kind: str, field: str, tensor: Tensor, shape: tuple[int, int, int], like: Tensor, layout: ChunkLayout
) -> None:
    device = tensor.device
    if (
        tensor.shape == shape
        and tensor.dtype is like.dtype
        and device == like.device
        and device.type == layout.device.type
        and (shape[2] <= 1 or tensor.stride(2) == 1)
    ):
        return
    name = f"{kind}.{field}"
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            f"{name} must have shape {list(shape)} (rows by the layout's offsets, heads, head dim): "
            f"got {list(tensor.shape)}."
        )
    if tensor.dtype != like.dtype:
        raise ShapeError(f"{name} must have events.query's dtype {like.dtype}: got {tensor.dtype}.")
    if tensor.device != like.device:
        raise ShapeError(f"{name} must be on events.query's device {like.device}: got {tensor.device}.")
    if tensor.device.type != layout.device.type:
        raise ShapeError(
            f"layout must be on {name}'s device {tensor.device}: got {layout.device}. Use layout.to(device)."
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(
            f"{name} must be contiguous in its last dimension: expected stride 1, got {tensor.stride(-1)}."
        )
