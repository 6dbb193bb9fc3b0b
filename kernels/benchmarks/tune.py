"""Time tile variants of each kernel alone, compiled in parallel first.

    python kernels/benchmarks/tune.py [--head-dim 64] [--kernels forward,queries,events,summaries]

Prints one row a variant, milliseconds per case; put the best into TUNED in summary_attention/triton_op.py.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
from cases import CASES, Case
from timing import median_ms

from ksa_kernels.summary_attention import triton_op
from ksa_kernels.summary_attention.triton_op import Blocks
from ksa_kernels.summary_attention.triton_tiles import tiles

B = Blocks
VARIANTS: dict[int, dict[str, list[Blocks]]] = {
    32: {
        "forward": [
            *(B(64, 64, 4, 3, registers) for registers in (80, 96, 128)),
            *(B(64, 64, 4, 3, registers, steady=True) for registers in (80, 96, 128)),
        ],
        "queries": [B(64, 64, 4, 3, registers) for registers in (80, 96, 128, 168)],
        "events": [B(32, 64, 4, 3, registers) for registers in (96, 128, 168)],
        "summaries": [B(64, 64, 4, 3, registers) for registers in (128, 168, None)],
    },
    64: {
        "forward": [
            B(64, 64, 4, 3, 128),
            B(64, 64, 4, 3, 128, steady=True),
            B(64, 64, 4, 3, 168, steady=True),
            B(64, 128, 4, 2, 168, steady=True),
            B(128, 64, 8, 3, 128, steady=True),
        ],
        "queries": [
            B(64, 32, 4, 3, 128),
            B(64, 64, 4, 3, 168),
        ],
        "events": [B(32, 64, 4, 3, 168), B(64, 64, 4, 3), B(32, 128, 8, 3, 168)],
        "summaries": [B(64, 64, 4, 3), B(32, 64, 4, 3), B(64, 32, 4, 3, 168), B(32, 128, 8, 3), B(64, 128, 8, 2)],
    },
    128: {
        "forward": [
            B(64, 32, 4, 3, 168, steady=True),
            B(64, 32, 4, 3, 168),
            B(128, 32, 8, 3, 128, steady=True),
            B(128, 64, 8, 2, 168, steady=True),
            B(128, 64, 8, 3, steady=True),
        ],
        "queries": [B(64, 64, 4, 2), B(64, 32, 4, 3), B(128, 32, 8, 3)],
        "events": [B(64, 64, 4, 2), B(32, 64, 4, 3), B(32, 64, 4, 2, 200)],
        "summaries": [B(64, 128, 8, 2), B(32, 128, 8, 3), B(32, 128, 8, 2)],
    },
}
WHERE = {"forward": 0, "queries": 1, "events": 2, "summaries": 3}


@functools.lru_cache(maxsize=1)
def inputs(case: Case) -> Any:
    """Return the inputs of the case timed last."""
    return case.inputs()


def runner(case: Case, kernel: str, blocks: Blocks) -> Callable[[], Any]:
    """Return a function that launches one kernel with these tiles."""
    triton_op.TUNED[case.head_dim] = triton_op.TUNED[case.head_dim]._replace(**{kernel: blocks})
    events, summaries, layout = inputs(case)
    kind = {"forward": "queries", "queries": "queries"}.get(kernel, kernel)
    none = torch.empty(0, 9, dtype=torch.int32, device="cuda")
    maps = [none] * 4
    maps[WHERE[kernel]] = tiles(layout, kind, blocks.m if kind == "queries" else blocks.n)
    rule = (case.chunk_size, case.summaries_per_chunk, case.window_chunks, -1)
    tensors = (*events, *summaries)

    def launch() -> Any:
        triton_op.TUNED[case.head_dim] = triton_op.TUNED[case.head_dim]._replace(**{kernel: blocks})
        if kernel == "forward":
            return triton_op.summary_attention_op(*tensors, maps, *rule)
        out = [torch.zeros_like(events.query), torch.zeros_like(summaries.query)]
        lse = [torch.zeros(x.shape[1], x.shape[0], device="cuda") + 6 for x in out]
        return lambda: triton_op.summary_attention_backward_op(
            *tensors, *out, *lse, *(torch.randn_like(x) for x in out), None, None, maps, *rule
        )

    return launch if kernel == "forward" else launch()


def warm(job: tuple[int, str, Blocks]) -> str:
    """Compile one variant into the cache on disk."""
    head_dim, kernel, blocks = job
    try:
        runner(Case("tiny", (640,), head_dim), kernel, blocks)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{kernel} {tuple(blocks)}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def main(head_dims: list[int], kernels: list[str], names: list[str], processes: int) -> None:
    """Compile, time, print."""
    jobs = [(d, kernel, blocks) for d in head_dims for kernel in kernels for blocks in VARIANTS[d][kernel]]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        failed = dict(zip(jobs, pool.map(warm, jobs, chunksize=1), strict=True))
    for head_dim in head_dims:
        cases = [case for case in CASES if case.head_dim == head_dim and (not names or case.name in names)]
        for kernel in kernels:
            print(f"{kernel} d={head_dim}: " + " | ".join(case.name for case in cases))
            rows: dict[Blocks, list[str]] = {blocks: [] for blocks in VARIANTS[head_dim][kernel]}
            for case in cases:
                for blocks, row in rows.items():
                    if not failed[head_dim, kernel, blocks]:
                        row.append(f"{median_ms(runner(case, kernel, blocks), 7):.3f}")
            for blocks, row in rows.items():
                print(" ", tuple(blocks), " ".join(row) or failed[head_dim, kernel, blocks], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", default="64")
    parser.add_argument("--kernels", default="forward,queries,events,summaries")
    parser.add_argument("--cases", default="")
    parser.add_argument("--processes", type=int, default=14)
    given = parser.parse_args()
    main(
        [int(d) for d in given.head_dim.split(",")],
        given.kernels.split(","),
        [name for name in given.cases.split(",") if name],
        given.processes,
    )
