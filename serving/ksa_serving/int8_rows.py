"""K/V rows in a quarter of their bytes: int8 with one float16 scale for each row's key or value of each head.

Rounding is symmetric: value = scale * whole number in -127..127, scale = the largest magnitude / 127 rounded up, so
that nothing is cut off. Rows read back are not those written: a state made from them is of its own parity, and says so.
"""

import torch
from torch import Tensor

SCALE_BYTES = 2


def row_bytes(num_heads: int, head_dim: int) -> int:
    """Return the bytes of one packed row."""
    return 2 * num_heads * (head_dim + SCALE_BYTES)


def pack_rows(rows: Tensor) -> bytes:
    """Return rows [n, 2, H, D] as bytes: for each row its scales, then its whole numbers."""
    if not len(rows):
        return b""
    values = rows.detach().to("cpu", torch.float32)
    largest = values.abs().amax(-1, keepdim=True)
    scale = (largest / 127).to(torch.float16)
    short = scale.float() * 127 < largest  # rounded down
    scale = torch.where(short, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    whole = (values / scale.float().clamp(min=2**-24)).round().clamp(-127, 127).to(torch.int8)
    count = len(values)
    parts = (scale.view(torch.int8).reshape(count, -1), whole.reshape(count, -1))
    return torch.cat(parts, dim=1).contiguous().numpy().tobytes()


def unpack_rows(content: bytes, num_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return the rows [n, 2, H, D] of bytes that `pack_rows` made."""
    if not content:
        return torch.zeros(0, 2, num_heads, head_dim, dtype=dtype)
    packed = torch.frombuffer(bytearray(content), dtype=torch.int8).view(-1, row_bytes(num_heads, head_dim))
    split = 2 * num_heads * SCALE_BYTES
    scale = packed[:, :split].contiguous().view(torch.float16).view(-1, 2, num_heads, 1)
    whole = packed[:, split:].view(-1, 2, num_heads, head_dim)
    return (scale.float() * whole.float()).to(dtype)
