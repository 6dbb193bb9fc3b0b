"""Which implementation of an operator runs. `"auto"` picks by device and says which; nothing falls back silently."""

import importlib.util
import logging
from enum import StrEnum

import torch

from ksa_kernels.errors import ImplUnavailableError

logger = logging.getLogger(__name__)


class Impl(StrEnum):
    """One way to compute an operator."""

    REFERENCE = "reference"
    """Dense, plain PyTorch: slow, quadratic in memory, obviously right."""
    TORCH = "torch"
    """Blocked PyTorch: any device and floating dtype, memory linear in the length."""
    TRITON = "triton"
    """Triton kernels: CUDA devices (or the Triton interpreter)."""


NAMES = tuple(each.value for each in Impl)
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def resolve(impl: str, device: torch.device, dtype: torch.dtype, unfit: str = "") -> Impl:
    """Return the implementation that `impl` means on this device.

    Args:
        impl: `"auto"` or the name of an implementation.
        device: where the tensors live.
        dtype: of the tensors.
        unfit: why the operator's Triton kernels do not take these tensors (of this shape); empty if they do.

    Raises:
        ImplUnavailableError: the name is unknown, or the implementation named cannot run here.
    """
    if impl == "auto":
        reason = "no CUDA device" if device.type != "cuda" else unfit or _why_no_triton(device, dtype)
        chosen = Impl.TORCH if reason else Impl.TRITON
        if logger.isEnabledFor(logging.DEBUG):  # asked in each layer of each append
            logger.debug("implementation chosen", extra={"impl": chosen.value, "why_not_triton": reason})
        return chosen
    if impl not in NAMES:
        raise ImplUnavailableError(f"impl must be one of auto, {', '.join(NAMES)}: got {impl!r}.")
    if impl == Impl.TRITON and (reason := unfit or _why_no_triton(device, dtype)):
        raise ImplUnavailableError(f'impl="triton" cannot run: {reason}. Use impl="torch", or "auto" to choose.')
    return Impl(impl)


def _why_no_triton(device: torch.device, dtype: torch.dtype) -> str:
    """Say why Triton cannot run here; empty if it can."""
    if dtype not in TRITON_DTYPES:
        return f"its kernels take float16, bfloat16 or float32, got {dtype}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    if device.type != "cuda" and not _interpreting():
        return f"it needs a CUDA device, got tensors on {device}"
    return ""


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
