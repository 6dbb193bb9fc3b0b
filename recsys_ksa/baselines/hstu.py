"""HSTU (arXiv 2402.17152): pointwise SiLU attention with a relative bias of position and time, gated, no feed-forward.

A layer: U, V, Q, K = SiLU(linear(norm(x))); A = SiLU(Q K^T + bias) / `max_positions`; x + linear(norm(A V) * U). The
bias is a learned number of the distance in events and one of the power of two of the seconds between two events.
The newest `model.max_positions` events are read. Not as published: the time of an event's row is its own, not its
successor's, so no row knows when the next event comes; the request time comes in as for every architecture here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ksa.baselines.padded import Pack, PaddedNetwork, causal
from recsys_ksa.config import ModelConfig
from recsys_ksa.features import NUM_GAP_BUCKETS
from recsys_ksa.model.features import FeatureSchema


class HSTUBlock(nn.Module):
    """One layer."""

    def __init__(self, config: ModelConfig, has_time: bool) -> None:
        super().__init__()
        self.head_dim, self.dropout, self.reach = config.head_dim, config.dropout, config.max_positions
        inner = config.num_heads * config.head_dim
        self.input_norm, self.norm = nn.LayerNorm(config.dim), nn.LayerNorm(inner)
        self.key_value = nn.Linear(config.dim, 2 * inner)
        self.query_gate = nn.Linear(config.dim, 2 * inner)
        self.output = nn.Linear(inner, config.dim)
        self.by_distance = nn.Parameter(torch.randn(config.max_positions) * 0.02)
        self.by_time = nn.Parameter(torch.randn(NUM_GAP_BUCKETS) * 0.02) if has_time else None

    def forward(self, x: Tensor, asked: Tensor | None, visible: Tensor, apart: Tensor, time_apart: Tensor) -> Tensor:
        """Return the rows after the block. [U, N, E]; keys and values never depend on `asked`.

        Args:
            x: [U, N, E].
            asked: [U, N, E] or None.
            visible: bool [U, N, N].
            apart: int64 [N, N], events between query and key.
            time_apart: int64 [U, N, N], bucket of the seconds between them.
        """
        key, value = F.silu(self.key_value(self.input_norm(x))).chunk(2, dim=-1)
        x = x if asked is None else x + asked
        query, gate = F.silu(self.query_gate(self.input_norm(x))).chunk(2, dim=-1)
        bias = _look_up(self.by_distance, apart)[None]
        if self.by_time is not None:
            bias = bias + _look_up(self.by_time, time_apart)
        weight = F.silu(self._heads(query) @ self._heads(key).transpose(-1, -2) + bias[:, None]) / self.reach
        seen = (weight * visible[:, None]) @ self._heads(value)
        gated = self.norm(seen.transpose(1, 2).flatten(2)) * gate
        return x + F.dropout(self.output(gated), self.dropout, self.training)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _look_up(numbers: Tensor, index: Tensor) -> Tensor:
    """Return numbers[index], whose own gradient on CUDA would add millions of equal indices one after the other."""
    return F.embedding(index, numbers[:, None]).squeeze(-1)


class HSTU(PaddedNetwork):
    """The network."""

    def __init__(self, config: ModelConfig, features: FeatureSchema) -> None:
        """Create the network with random parameters; without a clock it has no time bias."""
        super().__init__(config, features)
        self.max_length = config.max_positions
        self.blocks = nn.ModuleList(HSTUBlock(config, features.clock != "ordinal") for _ in config.layers)

    def read(self, events: Tensor, asked: Tensor | None, pack: Pack) -> Tensor:
        """Return what each event's row knows after it; see `PaddedNetwork.read`."""
        visible = causal(pack)
        index = torch.arange(events.shape[1], device=events.device)
        apart = (index[:, None] - index).clamp(min=0)
        time_apart = time_buckets(pack.timestamp[:, :, None] - pack.timestamp[:, None])
        x = events
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x, asked if depth == len(self.blocks) else None, visible, apart, time_apart)
        return x


def time_buckets(seconds: Tensor) -> Tensor:
    """Return the bucket of each gap, as `features.gap_bucket`; int64, any shape."""
    exponent = torch.frexp(seconds.clamp(min=0).double() + 1.0).exponent
    return exponent.long().clamp(max=NUM_GAP_BUCKETS - 1)
