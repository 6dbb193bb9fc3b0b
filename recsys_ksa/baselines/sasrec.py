"""SASRec (arXiv 1808.09781): full causal attention, learned positions, ReLU feed-forward, no time.

As published: layer norm before each branch, positions counted within the newest `model.max_positions` events, the only
ones read. Not as published: the head and the loss, which every architecture here shares. `use_gap` and
`use_request_time` are inputs of the shared kind; configs/baselines/sasrec.toml leaves them out, as SASRec does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ksa.baselines.padded import Pack, PaddedNetwork, attend
from recsys_ksa.config import ModelConfig
from recsys_ksa.model.features import FeatureSchema


class SASRecBlock(nn.Module):
    """Attention and feed-forward, each behind a layer norm and added to the residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dropout = config.num_heads, config.head_dim, config.dropout
        inner = config.num_heads * config.head_dim
        self.attention_norm, self.norm = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.query = nn.Linear(config.dim, inner)
        self.key_value = nn.Linear(config.dim, 2 * inner)
        self.output = nn.Linear(inner, config.dim)
        self.up, self.down = (
            nn.Linear(config.dim, config.feed_forward_dim),
            nn.Linear(config.feed_forward_dim, config.dim),
        )

    def forward(self, x: Tensor, asked: Tensor | None) -> Tensor:
        """Return the rows after the block. [U, N, E]; keys and values never depend on `asked`."""
        key, value = self._heads(self.key_value(self.attention_norm(x))).chunk(2, dim=1)
        x = x if asked is None else x + asked
        query = self._heads(self.query(self.attention_norm(x)))
        seen = attend(query, key, value)
        x = x + self._drop(self.output(seen.transpose(1, 2).flatten(2)))
        return x + self._drop(self.down(self._drop(F.relu(self.up(self.norm(x))))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class SASRec(PaddedNetwork):
    """The network."""

    def __init__(self, config: ModelConfig, features: FeatureSchema) -> None:
        """Create the network with random parameters."""
        super().__init__(config, features)
        self.max_length = config.max_positions
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in config.layers)

    def read(self, events: Tensor, asked: Tensor | None, pack: Pack) -> Tensor:
        """Return what each event's row knows after it; see `PaddedNetwork.read`."""
        x = events + self.positions(torch.arange(events.shape[1], device=events.device))
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x, asked if depth == len(self.blocks) else None)
        return x
