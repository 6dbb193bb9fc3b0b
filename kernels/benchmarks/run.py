"""Verify, then time summary attention and its peers in one run; print a table and write JSON.

    PYTHONPATH=kernels python kernels/benchmarks/run.py [--out results.json] [--cases jagged,1024] [--peers NAMES]

Refuses to time what fails its verification. Times are medians on a cold cache; the floor is the larger of unmasked
arithmetic at this device's measured matrix rate and of moving q, k, v and out once at its measured copy rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import append
import catalogue
import pointwise
import torch
import verify
from cases import CASES, Case
from peers import PEERS
from timing import measured_rates, median_ms

FLEX_CASES = ("jagged", "16384")
"""FlexAttention is compiled once a shape, half a minute each."""


def time_peer(name: str, case: Case) -> dict[str, Any] | None:
    """Return forward and forward-and-backward milliseconds, or None where the peer does not take the case."""
    made = PEERS[name](case, False)
    if made is None:
        return None
    with torch.no_grad():
        forward = median_ms(made[0])
    made = PEERS[name](case, True)
    if made is None:
        return {"forward_ms": forward, "both_ms": float("nan"), "peak_bytes": 0}
    run, inputs = made
    out = run()
    outs = out if isinstance(out, tuple) else (out,)
    d_outs = [torch.randn_like(each) for each in outs]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both = median_ms(lambda: torch.autograd.grad(run(), inputs, d_outs))
    peak = torch.cuda.max_memory_allocated() - before - (256 << 20)  # the timer's own buffer
    return {"forward_ms": forward, "both_ms": both, "peak_bytes": peak}


def main(out: Path | None, cases: Sequence[str], peers: Sequence[str], num_cases: int, processes: int) -> int:
    """Verify, time, print, write; return the exit status."""
    if num_cases and verify.main(num_cases, processes):
        print("not timed: verification failed")
        return 1
    flops, copied = measured_rates()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}: matrix {flops / 1e12:.0f} TFLOP/s, copy {copied / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    for case, name in ((case, name) for case in CASES if not cases or case.name in cases for name in PEERS):
        if (not peers or name in peers) and (not name.startswith("flex") or case.name in FLEX_CASES):
            floors = case.floor_ms(flops, copied)
            try:
                timed = time_peer(name, case)
            except Exception as error:
                print(f"{case.name} | {name} | {type(error).__name__}: {str(error)[:150]}")
                continue
            if timed is None:
                continue
            rows.append({"case": case.name, "impl": name, "floor_ms": floors, **timed})
            print(
                f"{case.name:12} | {name:16} | forward {timed['forward_ms']:.3f} ms "
                f"({timed['forward_ms'] / floors[0]:.1f}x floor) | both {timed['both_ms']:.2f} ms "
                f"({timed['both_ms'] / floors[1]:.1f}x) | peak {timed['peak_bytes'] / 2**20:.0f} MiB",
                flush=True,
            )
    appended = append.rows(copied) if not peers else []
    catalogued = catalogue.rows(flops) if not peers else []
    pointwise_rows = pointwise.rows() if not peers else []
    if out:
        limits = {"device": device, "torch": torch.__version__, "matrix_flops": flops, "copy_bytes": copied}
        others = {"append": appended, "catalogue": catalogued, "pointwise": pointwise_rows}
        out.write_text(json.dumps({**limits, "rows": rows, **others}, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", default="", help="names of cases; all of them unless given")
    parser.add_argument("--peers", default="", help="names of implementations; all of them unless given")
    parser.add_argument("--verify-cases", type=int, default=42)
    parser.add_argument("--processes", type=int, default=14)
    given = parser.parse_args()
    cases, peers = ([name for name in names.split(",") if name] for names in (given.cases, given.peers))
    sys.exit(main(given.out, cases, peers, given.verify_cases, given.processes))
