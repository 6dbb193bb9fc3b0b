"""One KSA block: pre-norm gated attention over events and summaries, then SwiGLU.

Event and summary tokens have their own query, key, value and gate projections and share the rest. A `summary`
block lets both attend by the visibility rule; a `full` block is plain causal over events and passes summaries by.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksa_kernels import QKV, ChunkLayout, summary_attention
from ksa_kernels.norm_rotary import norm_rotary, norm_rotary_pair
from ksa_kernels.rms_norm import EPS, rms_norm
from ksa_kernels.sigmoid_gate import sigmoid_gate
from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.model.rotary import Rotary

# Shapes: T tokens of one kind, E model dim, H heads, H_kv key and value heads, D head dim.


class Projection(nn.Module):
    """Queries, gates, keys and values of one kind of token; queries and keys per-head normalised and rotated.

    weight: [E, (2 H_kv + 2 H) D], columns key | value | query | gate, so that a pass that wants one side only reads one
    range of it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.gain = nn.Parameter(torch.ones(config.dim))
        self.weight = matrix(config.dim, 2 * (self.num_kv_heads + self.num_heads) * self.head_dim)
        self.key_gain = nn.Parameter(torch.ones(self.head_dim))
        self.query_gain = nn.Parameter(torch.ones(self.head_dim))

    def forward(self, x_TE: Tensor, rotary: Rotary, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
        """Return `queries` and `keys_values` of one product."""
        heads = rms_norm(x_TE, self.gain) @ self.weight
        columns = self.num_row_columns
        row = heads[:, :columns].view(-1, 2, self.num_kv_heads, self.head_dim)
        query, gate = heads[:, columns:].view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        rows, turned = norm_rotary_pair(
            row, query[:, None], self.key_gain, self.query_gain, *rotary, eps=EPS, impl=impl
        )
        return turned[:, 0], gate, rows

    def queries(self, x_TE: Tensor, rotary: Rotary, impl: str = "auto") -> tuple[Tensor, Tensor]:
        """Return queries [T, H, D] and what the output's gate opens by [T, H, D] (arXiv 2505.06708)."""
        columns = rms_norm(x_TE, self.gain) @ self.weight[:, self.num_row_columns :]
        query, gate = columns.view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        return norm_rotary(query[:, None], self.query_gain, *rotary, eps=EPS, impl=impl)[:, 0], gate

    def keys_values(self, x_TE: Tensor, rotary: Rotary, impl: str = "auto") -> Tensor:
        """Return keys and values side by side, [T, 2, H_kv, D]: the rows a user state keeps."""
        columns = rms_norm(x_TE, self.gain) @ self.weight[:, : self.num_row_columns]
        parts = columns.view(-1, 2, self.num_kv_heads, self.head_dim)
        return norm_rotary(parts, self.key_gain, *rotary, eps=EPS, impl=impl)

    def row_weights(self) -> dict[str, Tensor]:
        """Return the parameters that `keys_values` reads, by name."""
        return {"gain": self.gain, "weight": self.weight[:, : self.num_row_columns], "key_gain": self.key_gain}

    @property
    def num_row_columns(self) -> int:
        """Columns of `weight` that keys and values read, the first ones."""
        return 2 * self.num_kv_heads * self.head_dim


class Block(nn.Module):
    """Projections of both kinds of token, the shared output projection, and the feed-forward."""

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        self.kind: LayerKind = kind
        self.has_summaries = kind == "summary" and config.attention == "summary"
        self.event = Projection(config)
        self.summary = Projection(config) if self.has_summaries else None
        at_end = (2 * len(config.layers)) ** -0.5  # two branches a block add to the residual stream
        self.output = matrix(config.num_heads * config.head_dim, config.dim, at_end)
        self.gain = nn.Parameter(torch.ones(config.dim))
        self.up = matrix(config.dim, 2 * config.feed_forward_dim)
        self.down = matrix(config.feed_forward_dim, config.dim, at_end)
        self.dropout = config.dropout

    def finish(self, x_TE: Tensor, attended_THD: Tensor, gate_THD: Tensor, impl: str = "auto") -> Tensor:
        """Add the gated attention output and the feed-forward to the residual stream. [T, E] -> [T, E]."""
        x_TE = x_TE + self._drop(sigmoid_gate(attended_THD, gate_THD, impl=impl).flatten(1) @ self.output)
        gate, up = (rms_norm(x_TE, self.gain) @ self.up).chunk(2, dim=-1)
        return x_TE + self._drop((F.silu(gate) * up) @ self.down)

    def _drop(self, x_TE: Tensor) -> Tensor:
        return F.dropout(x_TE, self.dropout) if self.training and self.dropout else x_TE


def matrix(rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
    """Return a random [rows, columns] that x [T, rows] is multiplied with, outputs of x's size times `scale`.

    Not nn.Linear, whose weight lies the other way: with one token that product takes torch twice the time.
    """
    return nn.Parameter(torch.randn(rows, columns) * (scale * rows**-0.5))


def attend(
    event_query: Tensor,
    event_rows: Tensor,
    summary_query: Tensor,
    summary_rows: Tensor,
    layout: ChunkLayout,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Attend with keys and values kept side by side; returns outputs [Tq, H, D] and [Sq, H, D].

    Args:
        event_query, summary_query: [Tq, H, D], [Sq, H, D].
        event_rows, summary_rows: [Tk, 2, H_kv, D], [Sk, 2, H_kv, D].
    """
    events = QKV(event_query, *event_rows.unbind(1))
    summaries = QKV(summary_query, *summary_rows.unbind(1))
    device = event_query.device.type
    if torch.is_autocast_enabled(device):
        # The operator chooses its own precision: softmax in float32 whatever the inputs.
        with torch.autocast(device, enabled=False):
            result = summary_attention(events, summaries, layout, impl=impl)
    else:
        result = summary_attention(events, summaries, layout, impl=impl)
    return result.events, result.summaries
