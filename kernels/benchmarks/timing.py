"""Device time of a function: median over repeats, cold cache, launches queued ahead so that Python is not timed.

Every function rests the device first, ours and peers alike: it is power limited, and a second of dense attention slows
whatever comes next by up to a sixth; a quarter of a second later nothing of that is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

REST_SECONDS = 0.25


def median_ms(run: Callable[[], Any], repeats: int = 15) -> float:
    """Return the median device time of `run` in milliseconds, the cache emptied before each repeat."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    time.sleep(REST_SECONDS)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda._sleep(60_000_000)  # some 30 ms: the host is ahead from the first repeat on
    for start, stop in events:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(stop) for start, stop in events)


def measured_rates() -> tuple[float, float]:
    """Return this device's rates: bf16 matrix product (operations a second) and copy (bytes a second, both ways)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / (median_ms(lambda: a @ b) * 1e-3)
    source = torch.randn(1 << 28, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / (median_ms(lambda: target.copy_(source)) * 1e-3)
    return flops, copied
