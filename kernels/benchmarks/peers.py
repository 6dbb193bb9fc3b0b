"""The attentions that ours is timed against, on the same events: dense ones, and FlexAttention with our rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import NUM_HEADS, Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[], Any]
"""Runs a forward pass and returns its output, or a tuple of them."""


def ours(case: Case, requires_grad: bool) -> tuple[Run, list[Tensor]]:
    """Return summary attention by the Triton kernels, and its inputs."""
    from ksa_kernels import summary_attention

    events, summaries, layout = case.inputs(requires_grad=requires_grad)

    def run() -> Any:
        out = summary_attention(events, summaries, layout, impl="triton")
        return out.events, out.summaries

    return run, [*events, *summaries]


def dense(case: Case, requires_grad: bool, backend: SDPBackend) -> tuple[Run, list[Tensor]] | None:
    """Return plain causal attention over the events of equally long histories by one of SDPA's backends."""
    length = case.lengths[0]
    if len(set(case.lengths)) > 1:
        return None
    shape = (len(case.lengths), NUM_HEADS, length, case.head_dim)
    q, k, v = (_draw(shape, requires_grad) for _ in range(3))

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run, [q, k, v]


def varlen(case: Case, requires_grad: bool) -> tuple[Run, list[Tensor]] | None:
    """Return torch's flash attention over a jagged batch, causal and dense."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    q, k, v = (_draw((sum(case.lengths), NUM_HEADS, case.head_dim), requires_grad) for _ in range(3))
    offsets = torch.tensor([0, *case.lengths]).cumsum(0).to("cuda", torch.int32)
    longest = max(case.lengths)
    return (lambda: varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0))), [q, k, v]


def flex(case: Case, requires_grad: bool) -> tuple[Run, list[Tensor]]:
    """Return FlexAttention with our rule, all users in one sequence, events behind summaries (not interleaved).

    What a row sees is two ranges of columns, worked out beforehand, so that the mask looks up rows only.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first, second = (each.to("cuda", torch.int32) for each in _ranges_seen(case))

    def seen(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((j >= first[i, 0]) & (j < first[i, 1])) | ((j >= second[i, 0]) & (j < second[i, 1]))

    rows = len(first)
    mask = create_block_mask(seen, None, None, rows, rows, device="cuda", _compile=True)
    q, k, v = (_draw((1, NUM_HEADS, rows, case.head_dim), requires_grad) for _ in range(3))
    compiled = torch.compile(flex_attention, dynamic=False)
    return (lambda: compiled(q, k, v, block_mask=mask)), [q, k, v]


def _ranges_seen(case: Case) -> tuple[Tensor, Tensor]:
    """Return the summaries and the events each row sees, [rows, 2] first and stop; rows are summaries, then events."""
    layout, k, m = case.layout, case.chunk_size, case.summaries_per_chunk
    user = torch.arange(layout.num_users)
    num_sums = layout.num_query_summaries
    slot_user, event_user = (
        user.repeat_interleave(offsets.diff()) for offsets in (layout.summary_query_offsets, layout.event_query_offsets)
    )
    slot_base, event_base = layout.summary_query_offsets[slot_user], num_sums + layout.event_query_offsets[slot_user]
    chunk = layout.summary_query_chunk
    own_slots = torch.stack([slot_base + chunk * m, torch.arange(num_sums) + 1], 1)
    own_events = torch.stack([event_base + chunk * k, event_base + (chunk + 1) * k], 1)
    before = (layout.event_query_index // k - case.window_chunks).clamp_min(0)
    slot_base, event_base = layout.summary_query_offsets[event_user], num_sums + layout.event_query_offsets[event_user]
    old = torch.stack([slot_base, slot_base + before * m], 1)
    window = torch.stack([event_base + before * k, event_base + layout.event_query_index + 1], 1)
    return torch.cat([own_slots, old]), torch.cat([own_events, window])


def _draw(shape: tuple[int, ...], requires_grad: bool) -> Tensor:
    return torch.randn(shape, device="cuda").to(torch.bfloat16).requires_grad_(requires_grad)


PEERS: dict[str, Callable[[Case, bool], tuple[Run, list[Tensor]] | None]] = {
    "ksa triton": ours,
    "dense flash": lambda case, grad: dense(case, grad, SDPBackend.FLASH_ATTENTION),
    "dense cudnn": lambda case, grad: dense(case, grad, SDPBackend.CUDNN_ATTENTION),
    "dense varlen": varlen,
    "ksa flex": flex,
}
