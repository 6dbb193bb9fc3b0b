"""Append by what it means: gather the pages, then attend as in training."""

from __future__ import annotations

from torch import Tensor

from ksa_kernels.impl import Impl
from ksa_kernels.layout import ChunkLayout
from ksa_kernels.summary_append.cache import PagedCache
from ksa_kernels.summary_attention.api import QKV, AttentionOutput, summary_attention


def attend_gathered(
    event_query: Tensor, summary_query: Tensor, cache: PagedCache, layout: ChunkLayout, impl: Impl
) -> AttentionOutput:
    """Return what `summary_attention` returns for the cache's keys and values."""
    event_key, event_value, summary_key, summary_value = cache.gather(layout)
    events = QKV(event_query, event_key, event_value)
    return summary_attention(events, QKV(summary_query, summary_key, summary_value), layout, impl=impl.value)
