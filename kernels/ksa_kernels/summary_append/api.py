"""summary_append: what it takes, what it refuses, which implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ksa_kernels.errors import ShapeError
from ksa_kernels.impl import Impl, resolve
from ksa_kernels.layout import ChunkLayout
from ksa_kernels.summary_append.cache import PagedCache
from ksa_kernels.summary_attention.api import AttentionOutput


def summary_append(
    event_query: Tensor, summary_query: Tensor, cache: PagedCache, layout: ChunkLayout, *, impl: str = "auto"
) -> AttentionOutput:
    """Attend from new events, and from the summaries they close, to states kept in pages.

    The same rule and results as `summary_attention` with the same layout; keys and values, the new ones too
    (`cache.write`), are read from the cache's pages. No gradients.

    Args:
        event_query: [Tq, H, D] queries of the layout's events query_start..N-1; float16, bfloat16 or float32.
        summary_query: [Sq, H, D] queries of the summaries of the chunks that those events closed.
        cache: pages of the layout's users, in its order.
        layout: with query_start and key_start; built once a batch.
        impl: "auto" (Triton on CUDA, else "torch"), "reference", "torch" or "triton".

    Raises:
        ShapeError: a tensor or the cache disagrees with the layout.
        ImplUnavailableError: this device cannot run `impl`.
    """
    cache.check(layout)
    for name, query, rows in (
        ("event_query", event_query, layout.num_query_events),
        ("summary_query", summary_query, layout.num_query_summaries),
    ):
        if query.dim() != 3 or len(query) != rows:
            raise ShapeError(f"{name} must be [{rows}, H, D] by the layout: got shape {list(query.shape)}.")
        if query.dtype != cache.events.key.dtype:
            raise ShapeError(f"{name} must have the cache's dtype {cache.events.key.dtype}: got {query.dtype}.")
    chosen = chosen_impl(impl, event_query.device, event_query.dtype, event_query.shape[2])
    if chosen is Impl.TRITON:
        from ksa_kernels.summary_append.triton_append import attend

        return AttentionOutput(*attend(event_query, summary_query, cache, layout))
    from ksa_kernels.summary_append.reference import attend_gathered

    return attend_gathered(event_query, summary_query, cache, layout, chosen)


def chosen_impl(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Impl:
    """Return which implementation runs for `impl`; see `summary_append`."""
    fits = 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0
    unfit = "" if fits else f"its kernel takes head dims that are powers of two from 16 to 256, got {head_dim}"
    return resolve(impl, device, dtype, unfit)
