"""sigmoid_gate: what it takes, what it refuses, which implementation runs."""

from __future__ import annotations

from torch import Tensor

from ksa_kernels.errors import ShapeError
from ksa_kernels.impl import Impl, resolve


def sigmoid_gate(x: Tensor, gate: Tensor, *, impl: str = "auto") -> Tensor:
    """Return x * sigmoid(gate), [T, H, D] in x's dtype; computed in float32 on CUDA, rounded once.

    Args:
        x: [T, H, D].
        gate: likewise; a part of a projection, contiguous but for the first dimension.
        impl: "auto" (Triton on CUDA, else "torch"), "reference", "torch" or "triton".

    Raises:
        ShapeError: the tensors disagree.
        ImplUnavailableError: this device cannot run `impl`.
    Source: gated attention, arXiv:2505.06708.
    """
    if x.shape != gate.shape or x.dim() != 3 or x.dtype != gate.dtype:
        raise ShapeError(
            f"x and gate must be [T, H, D] of one shape and dtype: "
            f"got {list(x.shape)} {x.dtype} and {list(gate.shape)} {gate.dtype}."
        )
    if resolve(impl, x.device, x.dtype) is Impl.TRITON:
        for name, tensor in (("x", x), ("gate", gate)):
            if len(tensor) and not tensor[0].is_contiguous():  # the stride of a single head means nothing
                raise ShapeError(f"{name} must be contiguous but for its first dimension: got {tensor.stride()}.")
        from ksa_kernels.sigmoid_gate.triton_sigmoid_gate import forward

        return forward(x, gate)
    return x * gate.sigmoid()
