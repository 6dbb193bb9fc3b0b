"""Compare the Triton kernels with the float64 reference on this device, on fresh random inputs, outputs NaN before.

    python kernels/benchmarks/verify.py [--cases 42] [--seed 7]

The seed, drawn unless given, is printed. Exits with 1 and names the case if an output or gradient is off by more than
the dtype's budget.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
from typing import Any

import torch

from ksa_kernels import QKV, summary_attention
from ksa_kernels.testing import error_budget, make_layout, make_qkv, nan_filled_empty, relative_error

ROUNDING = 1.25


def random_case(draw: random.Random) -> dict[str, Any]:
    """Draw a rule, lengths around a chunk's, heads, and half of the time queries on top of a state."""
    k, window = draw.choice([2, 3, 8, 16, 64, 100, 256]), draw.choice([0, 1, 3, 32, None])
    lengths = [draw.choice([0, 1, k - 1, k, k + 1, draw.randint(0, 300), draw.randint(0, 1500)]) for _ in range(6)]
    rule: dict[str, Any] = {
        "chunk_size": k,
        "summaries_per_chunk": draw.choice([0, 1, 1, 2, 3, 8]),
        "window_chunks": window,
        "max_visible_chunks": draw.choice([None, None, 0, 1, 5, 40]),
        "unseen_summaries": draw.random() < 0.7,
    }
    if draw.random() < 0.5:
        starts = [draw.randint(0, n) for n in lengths]
        rule["query_start"] = starts
        rule["key_start"] = [0 if window is None else max(0, start // k - window) * k for start in starts]
    heads, kv_heads = draw.choice([(2, 2), (4, 2), (4, 1)])
    return {"lengths": lengths, "rule": rule, "heads": heads, "kv_heads": kv_heads}


def compare(case: dict[str, Any], head_dim: int, dtype: torch.dtype, seed: int) -> tuple[tuple[float, float], bool]:
    """Return the worst relative error of outputs and of gradients, and whether all are within budget.

    The budget is the dtype's. Where "torch" itself is beyond it (a gradient of a row or two that nearly cancels), no
    implementation of that precision meets it: "torch" rounds inputs and outputs alike but computes in float32. The
    budget is then `ROUNDING` times torch's error.
    """
    layout = make_layout(case["lengths"], **case["rule"]).to("cuda")
    shape = {"num_heads": case["heads"], "num_kv_heads": case["kv_heads"], "head_dim": head_dim, "seed": seed}
    inputs = make_qkv(layout, dtype=dtype, requires_grad=True, **shape)
    exact = tuple(QKV(*(each.detach().double().requires_grad_() for each in qkv)) for qkv in inputs)
    with nan_filled_empty():
        out, grads = _run(inputs, layout, "triton", seed)
    expected, expected_grads = _run(exact, layout, "reference", seed)
    rounded = [*itertools.chain(*_run(inputs, layout, "torch", seed))]
    exact_all = [*expected, *expected_grads]
    errors = [relative_error(a, b) for a, b in zip((*out, *grads), exact_all, strict=True)]
    rounding = [relative_error(a, b) for a, b in zip(rounded, exact_all, strict=True)]
    within = all(error <= _budget(dtype, torchs) for error, torchs in zip(errors, rounding, strict=True))
    return (_worst(errors[: len(out)]), _worst(errors[len(out) :])), within


def _budget(dtype: torch.dtype, torchs: float) -> float:
    budget = error_budget(dtype)
    return budget if torchs <= budget else ROUNDING * torchs


def _run(inputs: Any, layout: Any, impl: str, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    out = summary_attention(*inputs, layout, impl=impl)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(each.shape, generator=generator).to(each.device, each.dtype) for each in out]
    tensors = [*inputs[0], *inputs[1]]
    loss = sum((each * weight).sum() for each, weight in zip(out, weights, strict=True))
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    return list(out), [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True)]


def _worst(errors: list[float]) -> float:
    return float("nan") if any(error != error for error in errors) else max(errors)


def judge(job: tuple[int, dict[str, Any], int, torch.dtype]) -> tuple[tuple[float, float], str]:
    """Return a case's errors and, where it fails, why."""
    seed, case, head_dim, dtype = job
    try:
        errors, within = compare(case, head_dim, dtype, seed)
    except Exception as error:
        return (float("nan"), float("nan")), f"{type(error).__name__}: {str(error)[:300]}"
    return errors, "" if within else "over budget"


def main(num_cases: int, processes: int, seed: int | None = None) -> int:
    """Run the comparisons (side by side, since each compiles its own kernels); return the exit status."""
    seed = random.SystemRandom().randrange(1 << 30) if seed is None else seed
    print(f"verify: seed {seed}", flush=True)
    draw, failures = random.Random(seed), 0
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]
    jobs = [(nth, random_case(draw), draw.choice([32, 64, 128]), draw.choice(dtypes)) for nth in range(num_cases)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = pool.map(judge, jobs, chunksize=1)
    worst: dict[str, list[float]] = {}
    for job, (errors, reason) in zip(jobs, results, strict=True):
        if reason:
            failures += 1
            print("WRONG", reason, errors, job)
        else:
            seen = worst.setdefault(str(job[3]), [0.0, 0.0])
            seen[:] = [max(a, b) for a, b in zip(seen, errors, strict=True)]
    for name, (out, grad) in worst.items():
        print(f"{name}: worst relative error of outputs {out:.2g}, of gradients {grad:.2g}")
    print(f"{num_cases - failures} of {num_cases} cases within budget")
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=42)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seed", type=int)
    given = parser.parse_args()
    sys.exit(main(given.cases, given.processes, given.seed))
