"""Time a few rows on a cold card, and some seconds after dense attention: how long the timer must rest between rows.

PYTHONPATH=kernels python kernels/benchmarks/heat.py
"""

from __future__ import annotations

import time

import timing
import torch
from cases import CASES, Case
from peers import PEERS, Run

ROWS = (("ksa triton", "16384"), ("ksa triton", "65536 d=128"), ("dense cudnn", "1024"))
HEATED_SECONDS = 1.2
PAUSES = (0.0, 0.25, 1.0)


def main() -> None:
    """Print milliseconds forward: cold, and after each pause."""
    timing.REST_SECONDS = 0.0
    with torch.no_grad():
        heater = _run("dense cudnn", "65536 d=128")
        for name, case in ROWS:
            run = _run(name, case)
            found = [f"cold {timing.median_ms(run):.3f}"]
            for pause in PAUSES:
                stop = time.monotonic() + HEATED_SECONDS
                while time.monotonic() < stop:
                    heater()
                    torch.cuda.synchronize()
                time.sleep(pause)
                found.append(f"{pause} s after heat {timing.median_ms(run):.3f}")
            print(f"{name} {case}: {' | '.join(found)} ms", flush=True)


def _run(name: str, case: str) -> Run:
    made = PEERS[name](_case(case), False)
    assert made is not None
    return made[0]


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


if __name__ == "__main__":
    main()
