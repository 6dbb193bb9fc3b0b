"""What is timed: batches of about 131,072 events, and the least time that any implementation could need for them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from ksa_kernels import QKV, ChunkLayout
from ksa_kernels.testing import make_layout

NUM_EVENTS = 131_072
NUM_HEADS = 8


class Case(NamedTuple):
    """One batch of histories and the shape of its heads."""

    name: str
    lengths: tuple[int, ...]
    head_dim: int = 64
    chunk_size: int = 8
    window_chunks: int | None = 32
    """None: infinite (a full layer)."""
    summaries_per_chunk: int = 1

    @property
    def layout(self) -> ChunkLayout:
        """Layout on the CPU."""
        return make_layout(
            self.lengths,
            chunk_size=self.chunk_size,
            summaries_per_chunk=self.summaries_per_chunk,
            window_chunks=self.window_chunks,
        )

    def inputs(self, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> tuple[QKV, QKV, ChunkLayout]:
        """Return random events, summaries and the layout, on the GPU."""
        layout = self.layout.to("cuda")

        def draw(rows: int) -> QKV:
            shape = (rows, NUM_HEADS, self.head_dim)
            return QKV(*(torch.randn(shape, device="cuda").to(dtype).requires_grad_(requires_grad) for _ in range(3)))

        return draw(layout.num_query_events), draw(layout.num_query_summaries), layout

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that it sees, one head."""
        k, m = self.chunk_size, self.summaries_per_chunk
        window = max(self.lengths) if self.window_chunks is None else self.window_chunks
        pairs = 0
        for n in self.lengths:
            for chunk in range(-(-n // k)):
                first, stop = chunk * k, min((chunk + 1) * k, n)
                seen_from = max(0, chunk - window) * k
                count = stop - first
                pairs += count * (first - seen_from) + count * (count + 1) // 2 + count * max(0, chunk - window) * m
            pairs += n // k * (m * k + m * (m + 1) // 2)
        return pairs

    def floor_ms(self, flops_a_second: float, bytes_a_second: float) -> tuple[float, float]:
        """Return the floor of forward, and of forward and backward: the larger of arithmetic and of moving bytes once.

        Backward: 2.5 times the arithmetic and twice the bytes.
        """
        flops = self.num_pairs * NUM_HEADS * 4 * self.head_dim
        rows = sum(self.lengths) + sum(n // self.chunk_size for n in self.lengths) * self.summaries_per_chunk
        moved = 4 * rows * NUM_HEADS * self.head_dim * 2
        forward = max(flops / flops_a_second, moved / bytes_a_second) * 1e3
        backward = max(2.5 * flops / flops_a_second, 2 * moved / bytes_a_second) * 1e3
        return forward, forward + backward


def lognormal_lengths(total: int = NUM_EVENTS, median: int = 500, sigma: float = 1.2) -> tuple[int, ...]:
    """Return lengths of histories as logs have them: most short, a few very long (136 users, the longest 5,527)."""
    drawn = np.exp(math.log(median) + sigma * np.random.default_rng(0).standard_normal(total // 100))
    lengths = np.clip(np.rint(drawn), 1, 16_384).astype(int)
    users = int(np.searchsorted(lengths.cumsum(), total))
    return (*lengths[:users].tolist(), total - int(lengths[:users].sum()))


def equal_lengths(length: int) -> tuple[int, ...]:
    """Return as many histories of one length as fill the batch."""
    return (length,) * (NUM_EVENTS // length)


CASES = (
    Case("jagged", lognormal_lengths()),
    Case("256", equal_lengths(256)),
    Case("1024", equal_lengths(1024)),
    Case("4096", equal_lengths(4096)),
    Case("16384", equal_lengths(16_384)),
    Case("65536", equal_lengths(65_536)),
    Case("16384 d=128", equal_lengths(16_384), head_dim=128),
    Case("65536 d=128", equal_lengths(65_536), head_dim=128),
    Case("16384 d=32", equal_lengths(16_384), head_dim=32),
)
