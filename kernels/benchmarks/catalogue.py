"""Time catalogue_log_z, forward and backward, against PyTorch: the whole table, and blocks of items at a time.

PYTHONPATH=kernels python kernels/benchmarks/catalogue.py [--items 262144] [--dim 128]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import measured_rates, median_ms
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ksa_kernels.catalogue_softmax import catalogue_log_z
from ksa_kernels.testing import relative_error

NUM_USERS = 8192
BLOCK = 16_384


def whole_table(users: Tensor, items: Tensor, log_popularity: Tensor) -> Tensor:
    """Return log z from the table of scores: float32 sums of scores in the inputs' dtype."""
    return (users @ items.T + log_popularity.to(users.dtype)).float().logsumexp(1)


def blocks_of_items(users: Tensor, items: Tensor, log_popularity: Tensor) -> Tensor:
    """Return log z, a block of items at a time, each block's scores computed again in the backward pass."""
    parts = [
        checkpoint(whole_table, users, *each, use_reentrant=False)
        for each in zip(items.split(BLOCK), log_popularity.split(BLOCK), strict=True)
    ]
    return torch.stack(parts).logsumexp(0)  # type: ignore[arg-type]


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "triton": lambda *inputs: catalogue_log_z(*inputs, impl="triton"),
    "torch": lambda *inputs: catalogue_log_z(*inputs, impl="torch"),
    "chunked PyTorch": blocks_of_items,
    "whole table": whole_table,
}


def rows(flops: float, num_items: int = 262_144, dim: int = 128) -> list[dict[str, Any]]:
    """Return one row an implementation and dtype; `flops` is the measured matrix rate in operations a second."""
    found = []
    # one product forward; backward computes the scores again for either gradient: five in all
    floor = 2 * NUM_USERS * num_items * dim / flops * 1e3
    for dtype in (torch.bfloat16, torch.float32):
        users, items = (torch.randn(n, dim, device="cuda") / dim**0.25 for n in (NUM_USERS, num_items))
        users, items = (each.to(dtype).requires_grad_() for each in (users, items))
        log_popularity = torch.randn(num_items, device="cuda")
        d_out = torch.randn(NUM_USERS, device="cuda")
        exact = None
        for name, run in IMPLEMENTATIONS.items():
            try:
                out = run(users, items, log_popularity)
                grads = torch.autograd.grad(out, (users, items), d_out)
                if exact is None:
                    exact = _exact(users, items, log_popularity, d_out)
                errors = [relative_error(a, b) for a, b in zip((out, *grads), exact, strict=True)]
                del out, grads
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()

                def both(run: Any = run, inputs: Any = (users, items, log_popularity)) -> Any:
                    return torch.autograd.grad(run(*inputs), inputs[:2], d_out)  # noqa: B023

                both()
                peak = torch.cuda.max_memory_allocated() - before
                with torch.no_grad():
                    forward_ms = median_ms(lambda run=run: run(users, items, log_popularity), 5)  # noqa: B023
                both_ms = median_ms(both, 5)
            except torch.cuda.OutOfMemoryError:
                print(f"catalogue {dtype} | {name}: out of memory")
                continue
            times = {"forward_ms": forward_ms, "both_ms": both_ms, "peak_bytes": peak}
            found.append({"impl": name, "dtype": str(dtype), **times})
            print(
                f"catalogue {NUM_USERS} x {num_items} x {dim} {str(dtype)[6:]:8} | {name:15} | "
                f"forward {forward_ms:.2f} ms ({forward_ms / floor:.1f}x product) | "
                f"both {both_ms:.2f} ms ({both_ms / (5 * floor):.1f}x) | peak {peak / 2**20:.0f} MiB | "
                f"errors {', '.join(f'{error:.1e}' for error in errors)}",
                flush=True,
            )
    return found


def _exact(users: Tensor, items: Tensor, log_popularity: Tensor, d_out: Tensor) -> list[Tensor]:
    """Return log z and both gradients in float64, some users at a time."""
    u, v = users.detach().double(), items.detach().double()
    log_z, d_users, d_items = [], [], torch.zeros_like(v)
    for rows_u, rows_d in zip(u.split(512), d_out.double().split(512), strict=True):
        scores = rows_u @ v.T + log_popularity.double()
        log_z.append(scores.logsumexp(1))
        weights = (scores - log_z[-1][:, None]).exp_() * rows_d[:, None]
        d_users.append(weights @ v)
        d_items += weights.T @ rows_u
    return [torch.cat(log_z), torch.cat(d_users), d_items]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=262_144)
    parser.add_argument("--dim", type=int, default=128)
    given = parser.parse_args()
    rows(measured_rates()[0], given.items, given.dim)
