"""What tests and benchmarks of the kernels share: random inputs, an error budget from float64, poisoned outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ksa_kernels.layout import ChunkLayout
from ksa_kernels.summary_attention.api import QKV


def make_layout(lengths: Sequence[int], **rule: Any) -> ChunkLayout:
    """Return the layout of histories with these lengths; `rule` as in ChunkLayout.from_offsets."""
    return ChunkLayout.from_offsets([0, *accumulate(lengths)], **rule)


def make_qkv(
    layout: ChunkLayout,
    *,
    num_heads: int = 2,
    num_kv_heads: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[QKV, QKV]:
    """Return random events and summaries for a layout, on its device."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads

    def draw(rows: int, heads: int) -> Tensor:
        values = torch.randn(rows, heads, head_dim, generator=generator, dtype=torch.float64)
        return values.to(dtype).to(layout.device).requires_grad_(requires_grad)

    def qkv(queries: int, keys: int) -> QKV:
        return QKV(draw(queries, num_heads), draw(keys, num_kv_heads), draw(keys, num_kv_heads))

    return (
        qkv(layout.num_query_events, layout.num_key_events),
        qkv(layout.num_query_summaries, layout.num_key_summaries),
    )


def error_budget(dtype: torch.dtype) -> float:
    """Return the relative error that rounding of inputs, weights and outputs to `dtype` may cost."""
    return {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in float64; NaN anywhere gives NaN, two empty tensors give 0."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30)) if expected.numel() else 0.0


@contextlib.contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Make torch.empty and torch.empty_like give NaN, so that what a kernel does not write is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.dtype.is_floating_point else tensor

    with (
        mock.patch.object(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs))),
        mock.patch.object(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs))),
    ):
        yield
