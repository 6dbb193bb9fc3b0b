"""The Triton kernels as one operator, `ksa::summary_attention`, that torch.compile and torch.export take whole.

The operator's arguments are tensors and the rule's integers: the tile maps carry all that depends on the lengths, so
new lengths compile nothing and nothing waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from ksa_kernels.layout import ChunkLayout
from ksa_kernels.summary_attention.triton_backward import columns_kernel, queries_kernel
from ksa_kernels.summary_attention.triton_forward import forward_kernel
from ksa_kernels.summary_attention.triton_tiles import FOREVER, tiles

if TYPE_CHECKING:
    from ksa_kernels.summary_attention.api import QKV

LOG2E = 1.4426950408889634


class Blocks(NamedTuple):
    """Tile of one kernel: rows, columns, warps, stages of loads in flight."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None
    """Registers a thread may use: fewer let more programs share a multiprocessor."""
    fuse: bool = True
    """Take a tile's own summary queries along with its events, where they fit."""
    steady: bool = False
    """Keep the edges' maximum over whole tiles (forward kernel): faster there, slower at the edges."""

    @property
    def options(self) -> dict[str, Any]:
        """What a launch is given beside its arguments."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


class Tuning(NamedTuple):
    """Tiles of the three kernels (the third twice: event keys, summary keys)."""

    forward: Blocks
    queries: Blocks
    events: Blocks
    summaries: Blocks


# Tuned on an NVIDIA H100 80 GB (16 follows 64, as does 32 but for the forward pass); kernels/README.md has the rest.
NARROW = Tuning(
    forward=Blocks(64, 64, 4, 3, 128),
    queries=Blocks(64, 32, 4, 3, 128),
    events=Blocks(32, 64, 4, 3, 168),
    summaries=Blocks(64, 64, 4, 3),
)
WIDE = Tuning(
    forward=Blocks(64, 32, 4, 3, 168, steady=True),
    queries=Blocks(64, 64, 4, 2),
    events=Blocks(32, 64, 4, 3),
    summaries=Blocks(64, 128, 8, 2),
)
TUNED = {16: NARROW, 32: NARROW._replace(forward=Blocks(64, 64, 4, 3, 80)), 64: NARROW, 128: WIDE}
# float32 keeps twice the bytes in shared memory and runs on no tensor core: small tiles, one stage
EXACT = Tuning(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1))


def tuning(head_dim: int, dtype: torch.dtype) -> Tuning:
    """Return the tiles for a head dim and dtype."""
    return EXACT if dtype is torch.float32 else TUNED[head_dim]


def attend(events: QKV, summaries: QKV, layout: ChunkLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return events [Tq, H, D], summaries [Sq, H, D] and their log-sum-exps [Tq, H], [Sq, H]."""
    head_dim = events.query.shape[2]
    blocks = tuning(head_dim, events.query.dtype)
    maps = [
        tiles(layout, "queries", blocks.forward.m),
        tiles(layout, "queries", blocks.queries.m),
        tiles(layout, "events", blocks.events.n),
        tiles(layout, "summaries", blocks.summaries.n),
    ]
    out, summaries_out, lse, summaries_lse = summary_attention_op(
        *events,
        *summaries,
        maps,
        layout.chunk_size,
        layout.summaries_per_chunk,
        -1 if layout.window_chunks is None else layout.window_chunks,
        -1 if layout.max_visible_chunks is None else layout.max_visible_chunks,
    )
    return out, summaries_out, lse.T, summaries_lse.T


@torch.library.custom_op("ksa::summary_attention", mutates_args=())
def summary_attention_op(
    eq: Tensor, ek: Tensor, ev: Tensor, sq: Tensor, sk: Tensor, sv: Tensor,
    maps: list[Tensor], chunk_size: int, summaries_per_chunk: int, window: int, visible: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return outputs of events and summaries, and their natural log-sum-exps by head, [H, rows] float32."""
    eo, so = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (eq, sq))
    elsep, slsep = (_by_head(each) for each in (eq, sq))
    blocks = tuning(eq.shape[2], eq.dtype).forward
    if len(maps[0]):
        with _on(eq):
            forward_kernel[(len(maps[0]) * eq.shape[1],)](
                eq, ek, ev, sq, sk, sv, eo, so, elsep, slsep, maps[0],
                eq.shape[2] ** -0.5 * LOG2E, *_rule(window, visible), len(eq), len(sq),
                *_strides(eq, ek, ev, sq, sk, sv),
                H=eq.shape[1], G=eq.shape[1] // ek.shape[1], D=eq.shape[2],
                K=chunk_size, M=summaries_per_chunk, CAPPED=visible >= 0, SAME_STRIDES=_same_strides(ek, ev, sk, sv),
                STEADY=blocks.steady or window < 0,  # without a window nearly all tiles are whole
                PRECISION=_precision(eq), **_tile(blocks, chunk_size, summaries_per_chunk),
            )  # fmt: skip
    return eo, so, elsep, slsep


@summary_attention_op.register_fake
def _(eq, ek, ev, sq, sk, sv, maps, chunk_size, summaries_per_chunk, window, visible):
    eo, so = (each.new_empty(each.shape) for each in (eq, sq))
    return eo, so, _by_head(eq), _by_head(sq)


@torch.library.custom_op("ksa::summary_attention_backward", mutates_args=())
def summary_attention_backward_op(
    eq: Tensor, ek: Tensor, ev: Tensor, sq: Tensor, sk: Tensor, sv: Tensor,
    eo: Tensor, so: Tensor, elsep: Tensor, slsep: Tensor, edo: Tensor, sdo: Tensor,
    edlse: Tensor | None, sdlse: Tensor | None,
    maps: list[Tensor], chunk_size: int, summaries_per_chunk: int, window: int, visible: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the six inputs."""
    grads = tuple(torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (eq, ek, ev, sq, sk, sv))
    edq, edk, edv, sdq, sdk, sdv = grads
    edelta, sdelta = (
        torch.zeros_like(lse) if d_lse is None else -d_lse.contiguous()
        for lse, d_lse in ((elsep, edlse), (slsep, sdlse))
    )
    num_heads, num_kv_heads, head_dim = eq.shape[1], ek.shape[1], eq.shape[2]
    blocks = tuning(head_dim, eq.dtype)
    numbers = (head_dim**-0.5 * LOG2E, *_rule(window, visible), len(eq), len(sq))
    constants: dict[str, Any] = {
        "H": num_heads,
        "G": num_heads // num_kv_heads,
        "D": head_dim,
        "K": chunk_size,
        "M": summaries_per_chunk,
        "CAPPED": visible >= 0,
        "PRECISION": _precision(eq),
    }

    def columns(
        k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, where: Tensor, blocks: Blocks, is_summaries: bool
    ) -> None:
        if len(where):
            columns_kernel[(len(where) * num_kv_heads,)](
                k, v, dk, dv, eq, edo, elsep, edelta, sq, sdo, slsep, sdelta, where,
                *numbers, *_strides(k, v, eq, sq),
                SUMMARIES=is_summaries, **constants,
                **_tile_of_keys(blocks, chunk_size, summaries_per_chunk, is_summaries),
            )  # fmt: skip

    with _on(eq):
        if len(maps[1]):
            queries_kernel[(len(maps[1]) * num_heads,)](
                eq, ek, ev, sq, sk, sv, eo, so, elsep, slsep, edo, sdo, edelta, sdelta, edq, sdq, maps[1],
                *numbers, *_strides(eq, ek, ev, sq, sk, sv), **constants, SAME_STRIDES=_same_strides(ek, ev, sk, sv),
                **_tile(blocks.queries, chunk_size, summaries_per_chunk),
            )  # fmt: skip
        columns(sk, sv, sdk, sdv, maps[3], blocks.summaries, True)
        columns(ek, ev, edk, edv, maps[2], blocks.events, False)
    return edq, edk, edv, sdq, sdk, sdv


@summary_attention_backward_op.register_fake
def _(eq, ek, ev, sq, sk, sv, *others):
    return tuple(each.new_empty(each.shape) for each in (eq, ek, ev, sq, sk, sv))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output, *inputs[6])
    ctx.rule = inputs[7:]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved, maps = ctx.saved_tensors[:10], list(ctx.saved_tensors[10:])
    eo, so = saved[6:8]
    edo, sdo = (
        torch.zeros_like(o) if do is None else do.contiguous() for o, do in zip((eo, so), grads[:2], strict=True)
    )
    inputs = summary_attention_backward_op(*saved, edo, sdo, *grads[2:], maps, *ctx.rule)
    return *inputs, [None] * 4, *[None] * 4


summary_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _by_head(rows: Tensor) -> Tensor:
    return torch.empty((rows.shape[1], rows.shape[0]), dtype=torch.float32, device=rows.device)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for each in tensors for stride in each.stride()[:2]]


def _same_strides(ek: Tensor, ev: Tensor, sk: Tensor, sv: Tensor) -> bool:
    """Whether all rows of keys and values lie equally far apart: loops over them then share their addresses."""
    return len({each.stride(0) for each in (ek, ev, sk, sv) if len(each)}) <= 1


def _rule(window: int, visible: int) -> tuple[int, int]:
    return FOREVER if window < 0 else min(window, FOREVER), min(max(visible, 0), FOREVER)


def _precision(query: Tensor) -> str:
    return "ieee" if query.dtype is torch.float32 else "tf32"


def _tile(blocks: Blocks, chunk_size: int, summaries_per_chunk: int) -> dict[str, Any]:
    """Return the constants of a kernel whose programs take queries."""
    slots, block_s = _slots(blocks.m, chunk_size, summaries_per_chunk)
    fused = blocks.fuse and 0 < slots <= block_s and blocks.m % chunk_size == 0
    return dict(BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_S=block_s, FUSED=fused, **blocks.options)


def _tile_of_keys(blocks: Blocks, chunk_size: int, summaries_per_chunk: int, is_summaries: bool) -> dict[str, Any]:
    """Return the constants of a kernel whose programs take keys."""
    span = blocks.n * chunk_size // max(summaries_per_chunk, 1) if is_summaries else blocks.n
    slots, block_s = _slots(span, chunk_size, summaries_per_chunk)
    whole_chunks = blocks.n % (summaries_per_chunk if is_summaries else chunk_size) == 0
    fused = blocks.fuse and 0 < slots <= block_s and whole_chunks
    return dict(BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_S=block_s, FUSED=fused, **blocks.options)


def _slots(num_events: int, chunk_size: int, summaries_per_chunk: int) -> tuple[int, int]:
    """Return how many summaries `num_events` close, and rows for a block of them: a power of two that tl.dot takes."""
    slots = num_events // chunk_size * summaries_per_chunk
    return slots, min(64, max(16, triton.next_power_of_2(slots)))


def _on(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
