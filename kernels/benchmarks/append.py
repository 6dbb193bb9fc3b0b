"""Time summary_append: one new event a user, S summaries and a window of 256 events, eager and by graph replay.

PYTHONPATH=kernels python kernels/benchmarks/append.py
"""

from __future__ import annotations

from typing import Any

import torch
from timing import median_ms

from ksa_kernels import ChunkLayout
from ksa_kernels.summary_append import PagedCache, summary_append
from ksa_kernels.summary_append.cache import Pages
from ksa_kernels.testing import relative_error

CHUNK, WINDOW, HEADS, HEAD_DIM, PAGE = 8, 32, 8, 64, 64
CASES = ((1, 4096), (64, 4096), (512, 512), (512, 4096))


def make(num_users: int, num_summaries: int) -> tuple[Any, ...]:
    """Return query, no summary query, cache and layout of one new event a user."""
    length = CHUNK * (num_summaries + WINDOW) + 1
    layout = ChunkLayout.from_offsets(
        torch.arange(num_users + 1) * length,
        chunk_size=CHUNK,
        summaries_per_chunk=1,
        window_chunks=WINDOW,
        query_start=[length - 1] * num_users,
        key_start=[num_summaries * CHUNK] * num_users,
    ).to("cuda")
    like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    event_pages = Pages.allocate(num_users, CHUNK * WINDOW // PAGE + 2, PAGE, HEADS, HEAD_DIM, like)
    pages = Pages.allocate(num_users, (num_summaries + WINDOW) // PAGE + 2, PAGE, HEADS, HEAD_DIM, like)
    for pool in (event_pages, pages):
        pool.key.normal_()
        pool.value.normal_()
    query = torch.randn(num_users, HEADS, HEAD_DIM, device="cuda").to(torch.bfloat16)
    return query, query[:0], PagedCache(event_pages, pages), layout


def rows(copied: float) -> list[dict[str, Any]]:
    """Return one row a case; `copied` is the measured copy rate in bytes a second."""
    found = []
    for num_users, num_summaries in CASES:
        inputs = make(num_users, num_summaries)

        def run(inputs: tuple[Any, ...] = inputs) -> Any:
            return summary_append(*inputs, impl="triton")

        out = run()
        error = relative_error(out.events[:1], _first_user(inputs)) if num_users == 1 else 0.0
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        moved = num_users * (num_summaries + CHUNK * WINDOW) * HEADS * HEAD_DIM * 2 * 2
        eager, replay = median_ms(run), median_ms(graph.replay)
        floor = moved / copied * 1e3
        found.append({"users": num_users, "summaries": num_summaries, "eager_ms": eager, "replay_ms": replay})
        print(
            f"append {num_users} x {num_summaries}: eager {eager:.4f} ms, replay {replay:.4f} ms "
            f"({replay / floor:.2f}x bytes), error {error:.2g}",
            flush=True,
        )
    return found


def _first_user(inputs: tuple[Any, ...]) -> torch.Tensor:
    return summary_append(*inputs, impl="torch").events[:1]


if __name__ == "__main__":
    from timing import measured_rates

    rows(measured_rates()[1])
