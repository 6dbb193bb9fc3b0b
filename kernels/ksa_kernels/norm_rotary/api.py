"""norm_rotary: what it takes, what it refuses, which implementation runs."""

from __future__ import annotations

from torch import Tensor

from ksa_kernels.errors import ShapeError
from ksa_kernels.impl import Impl, resolve


def norm_rotary(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """Normalise each head of a token's first part, turn it by the token's angles, and pass the other parts on.

    normed = x[:, 0] / sqrt(mean(x[:, 0] ** 2) + eps) * weight;  out[:, 0] = normed * cos + halves_swapped(normed) * sin

    Computed in float32 (float64 for float64) and rounded once. Differentiable in x and weight.

    Args:
        x: [T, P, H, D] as a projection gives it: P parts of H heads, D even, contiguous but for the first dimension.
        weight: [D] of the norm.
        cos, sin: [T, 1, D] of each token's angles; the sine of the first half carries the minus.
        eps: added to the mean square.
        impl: "auto" (Triton on CUDA, else "torch"), "reference", "torch" or "triton".

    Returns:
        [T, P, H, D] in x's dtype, contiguous.

    Raises:
        ShapeError: tensors disagree.
        ImplUnavailableError: this device cannot run `impl`.
    Source: root mean square norm, arXiv:1910.07467; rotary positions, arXiv:2104.09864.
    """
    _check(x, weight, cos, sin)
    chosen = _choose(x, impl)
    if chosen is Impl.REFERENCE:
        from ksa_kernels.norm_rotary.reference import forward
    elif chosen is Impl.TRITON:
        num_parts, num_heads, head_dim = x.shape[1:]
        strides = (num_heads * head_dim, head_dim, 1) if num_parts > 1 else (x.stride(1), head_dim, 1)
        if x.stride()[1:] != strides:
            raise ShapeError(f"x must be contiguous but for its first dimension: got strides {x.stride()}.")
        from ksa_kernels.norm_rotary.triton_norm_rotary import forward
    else:
        from ksa_kernels.norm_rotary.torch_eager import forward
    return forward(x, weight, cos, sin, eps)


def norm_rotary_pair(
    x: Tensor,
    y: Tensor,
    x_weight: Tensor,
    y_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return `norm_rotary` of x [T, P, H, D] and of y [T, Q, J, D], two projections of the same tokens.

    In PyTorch both go through the operators together, which halves their number; otherwise one after the other.
    """
    if _choose(x, impl) is not Impl.TORCH:
        return (
            norm_rotary(x, x_weight, cos, sin, eps=eps, impl=impl),
            norm_rotary(y, y_weight, cos, sin, eps=eps, impl=impl),
        )
    from ksa_kernels.norm_rotary.torch_eager import forward_pair

    _check(x, x_weight, cos, sin)
    _check(y, y_weight, cos, sin)
    return forward_pair(x, y, x_weight, y_weight, cos, sin, eps)


def _check(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    shape = x.shape
    if len(shape) != 4 or shape[3] % 2 or shape[1] < 1:
        raise ShapeError(f"x must be [T, P, H, D] with P >= 1 and D even: got shape {list(shape)}.")
    num_tokens, _, _, head_dim = shape
    if weight.shape != (head_dim,):
        raise ShapeError(f"weight must be [D] = [{head_dim}]: got shape {list(weight.shape)}.")
    table = num_tokens, 1, head_dim
    if cos.shape != table or sin.shape != table:
        name, wrong = ("cos", cos) if cos.shape != table else ("sin", sin)
        raise ShapeError(f"{name} must be [T, 1, D] = {list(table)}: got {list(wrong.shape)}.")


def _choose(x: Tensor, impl: str) -> Impl:
    head_dim = x.shape[-1]
    fits = 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0
    return resolve(impl, x.device, x.dtype, "" if fits else f"it takes head dims 16, 32, 64, ..., 256, got {head_dim}")
