"""One KSA block: pre-norm gated attention over events and summaries, then SwiGLU.

Event and summary tokens have their own query, key, value and gate projections and share the rest. A `summary`
block lets both attend by the visibility rule; a `full` block is plain causal over events and passes summaries by.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksa_kernels import QKV, ChunkLayout, summary_attention
from ksa_kernels.norm_rotary import norm_rotary
from ksa_kernels.sigmoid_gate import sigmoid_gate
from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.model.rotary import Rotary

EPS = 1e-6

# Shapes: T tokens of one kind, E model dim, H heads, D head dim.


class Projection(nn.Module):
    """Queries, gates, keys and values of one kind of token, per-head normalised and rotated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.norm = nn.RMSNorm(config.dim, eps=EPS)
        self.query_gate = nn.Linear(config.dim, 2 * config.num_heads * config.head_dim, bias=False)
        self.key_value = nn.Linear(config.dim, 2 * config.num_kv_heads * config.head_dim, bias=False)
        self.query_norm = nn.RMSNorm(config.head_dim, eps=EPS)
        self.key_norm = nn.RMSNorm(config.head_dim, eps=EPS)

    def queries(self, normed_TE: Tensor, rotary: Rotary, impl: str = "auto") -> tuple[Tensor, Tensor]:
        """Return queries [T, H, D] and what the output's gate opens by [T, H, D] (arXiv 2505.06708)."""
        query, gate = self.query_gate(normed_TE).view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        return norm_rotary(query[:, None], self.query_norm.weight, *rotary, eps=EPS, impl=impl)[:, 0], gate

    def keys_values(self, normed_TE: Tensor, rotary: Rotary, impl: str = "auto") -> Tensor:
        """Return keys and values side by side, [T, 2, H_kv, D]: the rows a user state keeps."""
        key_value = self.key_value(normed_TE).view(-1, 2, self.num_kv_heads, self.head_dim)
        return norm_rotary(key_value, self.key_norm.weight, *rotary, eps=EPS, impl=impl)


class Block(nn.Module):
    """Projections of both kinds of token, the shared output projection, and the feed-forward."""

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        self.kind: LayerKind = kind
        self.has_summaries = kind == "summary" and config.attention == "summary"
        self.event = Projection(config)
        self.summary = Projection(config) if self.has_summaries else None
        self.output = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)
        self.norm = nn.RMSNorm(config.dim, eps=EPS)
        self.up = nn.Linear(config.dim, 2 * config.feed_forward_dim, bias=False)
        self.down = nn.Linear(config.feed_forward_dim, config.dim, bias=False)
        self.dropout = config.dropout

    def finish(self, x_TE: Tensor, attended_THD: Tensor, gate_THD: Tensor, impl: str = "auto") -> Tensor:
        """Add the gated attention output and the feed-forward to the residual stream. [T, E] -> [T, E]."""
        x_TE = x_TE + self._drop(self.output(sigmoid_gate(attended_THD, gate_THD, impl=impl).flatten(1)))
        gate, up = self.up(self.norm(x_TE)).chunk(2, dim=-1)
        return x_TE + self._drop(self.down(F.silu(gate) * up))

    def _drop(self, x_TE: Tensor) -> Tensor:
        return F.dropout(x_TE, self.dropout) if self.training and self.dropout else x_TE


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
    events = QKV(event_query, event_rows[:, 0], event_rows[:, 1])
    summaries = QKV(summary_query, summary_rows[:, 0], summary_rows[:, 1])
    device = event_query.device.type
    if torch.is_autocast_enabled(device):
        # The operator chooses its own precision: softmax in float32 whatever the inputs.
        with torch.autocast(device, enabled=False):
            result = summary_attention(events, summaries, layout, impl=impl)
    else:
        result = summary_attention(events, summaries, layout, impl=impl)
    return result.events, result.summaries
