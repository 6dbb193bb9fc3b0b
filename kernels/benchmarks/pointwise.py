"""Time norm_rotary and sigmoid_gate by Triton and by PyTorch as a layer uses them: 131,072 tokens, H = 8, d = 64, bf16.

PYTHONPATH=kernels python kernels/benchmarks/pointwise.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import NUM_EVENTS, NUM_HEADS
from timing import median_ms
from torch import Tensor

from ksa_kernels.norm_rotary import norm_rotary
from ksa_kernels.sigmoid_gate import sigmoid_gate

HEAD_DIM = 64


def rows() -> list[dict[str, Any]]:
    """Return one row a use and implementation."""
    shape = (NUM_EVENTS, NUM_HEADS, HEAD_DIM)
    weight = torch.ones(HEAD_DIM, device="cuda", requires_grad=True)
    cos, sin = (torch.randn(NUM_EVENTS, 1, HEAD_DIM, device="cuda") for _ in range(2))
    pair = _draw(NUM_EVENTS, 2, *shape[1:]).requires_grad_()
    attended = _draw(*shape).requires_grad_()
    d_one, d_pair = _draw(*shape), _draw(*pair.shape)

    def queries(impl: str) -> tuple[Tensor, Tensor]:
        query, gate = pair.unbind(1)
        return norm_rotary(query[:, None], weight, cos, sin, impl=impl)[:, 0], gate

    def keys_values(impl: str) -> tuple[Tensor]:
        return (norm_rotary(pair, weight, cos, sin, impl=impl),)

    def gate(impl: str) -> tuple[Tensor]:
        return (sigmoid_gate(attended, pair[:, 1], impl=impl),)

    uses: dict[str, tuple[Callable[[str], tuple[Tensor, ...]], list[Tensor], tuple[Tensor, ...]]] = {
        "queries": (queries, [pair, weight], (d_one, d_one)),
        "keys and values": (keys_values, [pair, weight], (d_pair,)),
        "gate": (gate, [attended, pair], (d_one,)),
    }
    found = []
    for name, (run, inputs, d_outs) in uses.items():
        for impl in ("triton", "torch"):
            with torch.no_grad():
                forward = median_ms(lambda: run(impl), 7)  # noqa: B023
            both = median_ms(lambda: torch.autograd.grad(run(impl), inputs, d_outs), 7)  # noqa: B023
            found.append({"use": name, "impl": impl, "forward_ms": forward, "both_ms": both})
            print(f"{name:15} | {impl:6} | forward {forward:.3f} ms | both {both:.3f} ms", flush=True)
    return found


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


if __name__ == "__main__":
    rows()
