"""catalogue_log_z: what it takes, what it refuses, which implementation runs."""

from __future__ import annotations

from torch import Tensor

from ksa_kernels.errors import ShapeError
from ksa_kernels.impl import Impl, resolve


def catalogue_log_z(
    users: Tensor, items: Tensor, log_popularity: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Return log sum_i exp(users[t] . items[i] + log_popularity[i]) for each t: float32 (float64 for float64) [T].

    A full softmax's loss is this minus the target's own score. Memory is independent of T times the number of items,
    forward and backward.

    Args:
        users: [T, D] in float16, bfloat16, float32 or float64.
        items: [I, D] of the same dtype, I >= 1.
        log_popularity: [I] added to the items' scores: a log q correction, or a learned bias (it has a gradient).
        impl: "auto" (Triton on CUDA, else "torch"), "reference", "torch" or "triton".

    Raises:
        ShapeError: tensors disagree.
        ImplUnavailableError: this device cannot run `impl`.
    Source: blocks recomputed in the backward pass, as in Cut Your Losses, arXiv:2411.09009.
    """
    if users.dim() != 2 or items.dim() != 2 or users.shape[1] != items.shape[1] or not len(items):
        raise ShapeError(
            f"users [T, D] and items [I, D] must share D, with I >= 1: got {list(users.shape)} and {list(items.shape)}."
        )
    if users.dtype != items.dtype or users.device != items.device:
        raise ShapeError(
            f"items must have users' dtype and device {users.dtype}, {users.device}: got {items.dtype}, {items.device}."
        )
    if log_popularity is not None and log_popularity.shape != items.shape[:1]:
        raise ShapeError(f"log_popularity must be [{len(items)}]: got {list(log_popularity.shape)}.")
    chosen = resolve(impl, users.device, users.dtype)
    if chosen is Impl.REFERENCE:
        from ksa_kernels.catalogue_softmax.reference import log_z
    elif chosen is Impl.TRITON:
        from ksa_kernels.catalogue_softmax.triton_log_z import log_z
    else:
        from ksa_kernels.catalogue_softmax.torch_blocked import log_z
    return log_z(users, items, log_popularity)
