"""One pass over the rows (token, head) in Triton, forward and backward.

    r = 1 / sqrt(mean(x**2) + eps),  n = x r w,  out_1 = n_1 cos_1 + n_2 sin_1,  out_2 = n_2 cos_2 + n_1 sin_2
    dn_1 = do_1 cos_1 + do_2 sin_2,  dn_2 = do_2 cos_2 + do_1 sin_1
    dx = r (dn w - x r mean(dn w x r)),  dw = sum over rows of dn x r

1 and 2 are the halves of a head. A program takes ROWS rows; its share of dw goes to a row of its own and those are
summed outside, in order: the same bits every time. The backward pass computes r again.

Letters: T tokens, P parts, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64


@triton.jit
def _halves(pointer, rows, exists, stride, HALF: tl.constexpr):
    """Load both halves of rows as float32."""
    at = pointer + rows[:, None] * stride + tl.arange(0, HALF)[None, :]
    first = tl.load(at, mask=exists[:, None], other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=exists[:, None], other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(pointer, rows, exists, stride, first, second, HALF: tl.constexpr):
    at = pointer + rows[:, None] * stride + tl.arange(0, HALF)[None, :]
    tl.store(at, first.to(pointer.dtype.element_ty), mask=exists[:, None])
    tl.store(at + HALF, second.to(pointer.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _copy_parts(
    from_ptr, to_ptr, exists, token, head, from_token, to_token,
    P: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Copy all parts but the first."""
    for part in tl.static_range(1, P):
        at = (part * H + head)[:, None] * D + tl.arange(0, D)[None, :]
        values = tl.load(from_ptr + token[:, None] * from_token + at, mask=exists[:, None], other=0.0)
        tl.store(to_ptr + token[:, None] * to_token + at, values, mask=exists[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, num_rows, x_token, eps,
    P: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists, token, head = row < num_rows, row // H, row % H
    w_1 = tl.load(weight_ptr + tl.arange(0, HALF))[None, :].to(tl.float32)
    w_2 = tl.load(weight_ptr + HALF + tl.arange(0, HALF))[None, :].to(tl.float32)
    x_1, x_2 = _halves(x_ptr + (token * x_token + head * D)[:, None], row * 0, exists, 0, HALF)
    cos_1, cos_2 = _halves(cos_ptr, token, exists, D, HALF)
    sin_1, sin_2 = _halves(sin_ptr, token, exists, D, HALF)
    r = tl.rsqrt((tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / D + eps)[:, None]
    n_1, n_2 = x_1 * r * w_1, x_2 * r * w_2
    out_base = out_ptr + (token * (P * H * D) + head * D)[:, None]
    _store_halves(out_base, row * 0, exists, 0, n_1 * cos_1 + n_2 * sin_1, n_2 * cos_2 + n_1 * sin_2, HALF)
    _copy_parts(x_ptr, out_ptr, exists, token, head, x_token, P * H * D, P, H, D)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, d_out_ptr, d_x_ptr, d_weight_ptr, num_rows, x_token, eps,
    P: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists, token, head = row < num_rows, row // H, row % H
    w_1 = tl.load(weight_ptr + tl.arange(0, HALF))[None, :].to(tl.float32)
    w_2 = tl.load(weight_ptr + HALF + tl.arange(0, HALF))[None, :].to(tl.float32)
    x_1, x_2 = _halves(x_ptr + (token * x_token + head * D)[:, None], row * 0, exists, 0, HALF)
    place = (token * (P * H * D) + head * D)[:, None]
    do_1, do_2 = _halves(d_out_ptr + place, row * 0, exists, 0, HALF)
    cos_1, cos_2 = _halves(cos_ptr, token, exists, D, HALF)
    sin_1, sin_2 = _halves(sin_ptr, token, exists, D, HALF)
    r = tl.rsqrt((tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / D + eps)[:, None]
    x_1, x_2 = x_1 * r, x_2 * r
    dn_1, dn_2 = do_1 * cos_1 + do_2 * sin_2, do_2 * cos_2 + do_1 * sin_1
    d_weight = d_weight_ptr + tl.program_id(0) * D + tl.arange(0, HALF)
    tl.store(d_weight, tl.sum(dn_1 * x_1, 0))
    tl.store(d_weight + HALF, tl.sum(dn_2 * x_2, 0))
    dn_1, dn_2 = dn_1 * w_1, dn_2 * w_2
    mean = ((tl.sum(dn_1 * x_1, 1) + tl.sum(dn_2 * x_2, 1)) / D)[:, None]
    _store_halves(d_x_ptr + place, row * 0, exists, 0, r * (dn_1 - x_1 * mean), r * (dn_2 - x_2 * mean), HALF)
    _copy_parts(d_out_ptr, d_x_ptr, exists, token, head, P * H * D, P * H * D, P, H, D)


@torch.library.custom_op("ksa::norm_rotary", mutates_args=())
def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return [T, P, H, D]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device(x.device if x.is_cuda else -1):
            forward_kernel[_grid(x)](
                x, weight, cos.contiguous(), sin.contiguous(), out, len(x) * x.shape[2], x.stride(0), eps, **_sizes(x)
            )
    return out


@forward.register_fake
def _(x, weight, cos, sin, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("ksa::norm_rotary_backward", mutates_args=())
def backward(
    d_out: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, contiguous, and of weight."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return d_x, torch.zeros_like(weight)
    shares = torch.empty((*_grid(x), x.shape[3]), dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device if x.is_cuda else -1):
        backward_kernel[_grid(x)](
            x, weight, cos.contiguous(), sin.contiguous(), d_out.contiguous(), d_x, shares,
            len(x) * x.shape[2], x.stride(0), eps, **_sizes(x),
        )  # fmt: skip
    return d_x, shares.sum(0).to(weight.dtype)


@backward.register_fake
def _(d_out, x, weight, cos, sin, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps = inputs[4]


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(d_out, *ctx.saved_tensors, ctx.eps), None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(len(x) * x.shape[2], ROWS),)


def _sizes(x: Tensor) -> dict[str, int]:
    return {"P": x.shape[1], "H": x.shape[2], "D": x.shape[3], "ROWS": ROWS, "num_warps": 4}
