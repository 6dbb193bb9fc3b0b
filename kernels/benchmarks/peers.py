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


def full(case: Case, requires_grad: bool) -> tuple[Run, list[Tensor]]:
    """Return our kernels as plain causal attention over the events: what `full` layers run."""
    return ours(case._replace(window_chunks=None, summaries_per_chunk=0), requires_grad)


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


def flex(case: Case, requires_grad: bool, prefix: bool = False, tile: int = 128) -> tuple[Run, list[Tensor]] | None:
    """Return FlexAttention with our rule, all users in one sequence, events never between summaries.

    What a row sees is two ranges of columns, worked out beforehand, so that the mask looks up rows only.

    Args:
        case, requires_grad: as ever.
        prefix: each user's summaries before the user's events; else all summaries before all events.
        tile: of the block mask; with 64 FlexAttention finds no backward configuration.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if tile < 128 and requires_grad:
        return None
    first, second = (each.to("cuda", torch.int32) for each in _ranges_seen(case, prefix))

    def seen(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((j >= first[i, 0]) & (j < first[i, 1])) | ((j >= second[i, 0]) & (j < second[i, 1]))

    rows = len(first)
    mask = create_block_mask(seen, None, None, rows, rows, device="cuda", BLOCK_SIZE=tile, _compile=True)
    q, k, v = (_draw((1, NUM_HEADS, rows, case.head_dim), requires_grad) for _ in range(3))
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {} if tile >= 128 else {"kernel_options": {"BLOCK_M": tile, "BLOCK_N": tile}}
    return (lambda: compiled(q, k, v, block_mask=mask, **options)), [q, k, v]


def _ranges_seen(case: Case, prefix: bool) -> tuple[Tensor, Tensor]:
    """Return the summaries and the events each row sees, [rows, 2] first and stop, in the order of the rows."""
    layout, k, m = case.layout, case.chunk_size, case.summaries_per_chunk
    user = torch.arange(layout.num_users)
    slot_offsets, event_offsets = layout.summary_query_offsets, layout.event_query_offsets
    slot_user, event_user = (user.repeat_interleave(offsets.diff()) for offsets in (slot_offsets, event_offsets))
    if prefix:
        slots_at = slot_offsets[:-1] + event_offsets[:-1]
        events_at = slots_at + slot_offsets.diff()
    else:
        slots_at, events_at = slot_offsets[:-1], layout.num_query_summaries + event_offsets[:-1]
    chunk, slot, index = layout.summary_query_chunk, layout.summary_query_slot, layout.event_query_index
    before = (index // k - case.window_chunks).clamp_min(0)
    slot_base, event_base = slots_at[slot_user], events_at[slot_user]
    own_slots = torch.stack([slot_base + chunk * m, slot_base + chunk * m + slot + 1], 1)
    own_events = torch.stack([event_base + chunk * k, event_base + (chunk + 1) * k], 1)
    slot_rows = slot_base + chunk * m + slot
    slot_base, event_base = slots_at[event_user], events_at[event_user]
    old = torch.stack([slot_base, slot_base + before * m], 1)
    window = torch.stack([event_base + before * k, event_base + index + 1], 1)
    order = torch.cat([slot_rows, event_base + index]).argsort()
    return torch.cat([own_slots, old])[order], torch.cat([own_events, window])[order]


def _draw(shape: tuple[int, ...], requires_grad: bool) -> Tensor:
    return torch.randn(shape, device="cuda").to(torch.bfloat16).requires_grad_(requires_grad)


PEERS: dict[str, Callable[[Case, bool], tuple[Run, list[Tensor]] | None]] = {
    "ksa triton": ours,
    "dense flash": lambda case, grad: dense(case, grad, SDPBackend.FLASH_ATTENTION),
    "dense cudnn": lambda case, grad: dense(case, grad, SDPBackend.CUDNN_ATTENTION),
    "dense varlen": varlen,
    "full triton": full,
    "flex separate": flex,
    "flex prefix": lambda case, grad: flex(case, grad, prefix=True),
    "flex separate 64": lambda case, grad: flex(case, grad, tile=64),
    "flex prefix 64": lambda case, grad: flex(case, grad, prefix=True, tile=64),
}
