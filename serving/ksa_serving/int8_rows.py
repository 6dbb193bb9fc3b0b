"""K/V rows in little more than a quarter of their bytes: int8, a float32 scale for each row's key or value of a head.

Rounding is symmetric: value = scale * whole number in -127..127, scale = the largest magnitude / 127. (A float16 scale
would end at values of 8e6.) Rows read back are not those written: a state made from them is of its own parity, and
says so.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4


def row_bytes(num_heads: int, head_dim: int) -> int:
    """Return the bytes of one packed row."""
    return 2 * num_heads * (head_dim + SCALE_BYTES)


def pack_rows(rows: Tensor) -> bytes:
    """Return rows [n, 2, H, D] as bytes: for each row its scales, then its whole numbers."""
    if not len(rows):
        return b""
    values = rows.detach().to("cpu", torch.float32)
    largest = values.abs().amax(-1, keepdim=True)
    scale = largest / 127
    whole = (values / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127).to(torch.int8)
    count = len(values)
    parts = (scale.view(torch.int8).reshape(count, -1), whole.reshape(count, -1))
    return torch.cat(parts, dim=1).contiguous().numpy().tobytes()


def unpack_rows(content: bytes, num_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return the rows [n, 2, H, D] of bytes that `pack_rows` made."""
    if not content:
        return torch.zeros(0, 2, num_heads, head_dim, dtype=dtype)
    packed = torch.frombuffer(bytearray(content), dtype=torch.int8).view(-1, row_bytes(num_heads, head_dim))
    split = 2 * num_heads * SCALE_BYTES
    scale = packed[:, :split].clone(memory_format=torch.contiguous_format).view(torch.float32).view(-1, 2, num_heads, 1)
    whole = packed[:, split:].view(-1, 2, num_heads, head_dim)
    return (scale * whole.float()).to(dtype)
