"""One pass over the tokens in Triton, forward and backward.

    out = x s,  dx = dout s,  dgate = dout x s (1 - s),  s = sigmoid(gate)

The backward pass computes s again: only x and the gate are kept. Letters: T tokens, E = H x D elements a token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096
"""Elements a program takes."""


@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    x_ptr, gate_ptr, out_ptr, num_tokens, x_token, gate_token,
    E: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    element = tl.arange(0, WIDTH)[None, :]
    exists = (token < num_tokens) & (element < E)
    x = tl.load(x_ptr + token * x_token + element, mask=exists).to(tl.float32)
    gate = tl.load(gate_ptr + token * gate_token + element, mask=exists).to(tl.float32)
    tl.store(out_ptr + token * E + element, (x * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_tokens"])
def backward_kernel(
    d_out_ptr, x_ptr, gate_ptr, d_x_ptr, d_gate_ptr, num_tokens, x_token, gate_token,
    E: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    element = tl.arange(0, WIDTH)[None, :]
    exists = (token < num_tokens) & (element < E)
    x = tl.load(x_ptr + token * x_token + element, mask=exists).to(tl.float32)
    s = tl.sigmoid(tl.load(gate_ptr + token * gate_token + element, mask=exists).to(tl.float32))
    d_out = tl.load(d_out_ptr + token * E + element, mask=exists).to(tl.float32)
    tl.store(d_x_ptr + token * E + element, (d_out * s).to(d_x_ptr.dtype.element_ty), mask=exists)
    d_gate = d_out * x * s * (1 - s)
    tl.store(d_gate_ptr + token * E + element, d_gate.to(d_gate_ptr.dtype.element_ty), mask=exists)


@torch.library.custom_op("ksa::sigmoid_gate", mutates_args=())
def forward(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * sigmoid(gate), contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device(x.device if x.is_cuda else -1):
            forward_kernel[_grid(x)](x, gate, out, len(x), x.stride(0), gate.stride(0), **_sizes(x))
    return out


@forward.register_fake
def _(x, gate):
    return x.new_empty(x.shape)


@torch.library.custom_op("ksa::sigmoid_gate_backward", mutates_args=())
def backward(d_out: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and gate, contiguous."""
    d_x, d_gate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel():
        with torch.cuda.device(x.device if x.is_cuda else -1):
            backward_kernel[_grid(x)](
                d_out.contiguous(), x, gate, d_x, d_gate, len(x), x.stride(0), gate.stride(0), **_sizes(x)
            )
    return d_x, d_gate


@backward.register_fake
def _(d_out, x, gate):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return backward(d_out, *ctx.saved_tensors)


forward.register_autograd(_backward, setup_context=_setup_context)


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(len(x), _sizes(x)["TOKENS"]),)


def _sizes(x: Tensor) -> dict[str, int]:
    elements = x.shape[1] * x.shape[2]
    width = triton.next_power_of_2(elements)
    return {"E": elements, "WIDTH": width, "TOKENS": max(1, ELEMENTS // width), "num_warps": 4}
