"""Time summary_append: one new event a user, S summaries and a window of 256 events, beside FlexAttention's decoding.

    PYTHONPATH=kernels python kernels/benchmarks/append.py

Three times each. `eager` and `replay` (of a CUDA graph of one call) start on a cold cache and hold what a launch costs;
`in a row` is the time a call of many in one graph, caches warm (`triton.testing.do_bench_cudagraph`). FlexAttention
reads as many keys, laid out for it in one block a user: it cannot read pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import median_ms
from torch import Tensor
from triton.testing import do_bench_cudagraph

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
    """Return one row a case and implementation; `copied` is the measured copy rate in bytes a second."""
    found = []
    for num_users, num_summaries in CASES:
        inputs = make(num_users, num_summaries)

        def ours(inputs: tuple[Any, ...] = inputs) -> Any:
            return summary_append(*inputs, impl="triton")

        error = relative_error(ours().events[:1], _first_user(inputs)) if num_users == 1 else 0.0
        keys = num_summaries + CHUNK * WINDOW + 1
        for name, run in (("ours", ours), ("flex decode", flex_decode(num_users, keys))):
            times = _times(run)
            floor = num_users * keys * HEADS * HEAD_DIM * 2 * 2 / copied * 1e3
            found.append({"users": num_users, "summaries": num_summaries, "impl": name, **times})
            print(
                f"append {num_users} x {num_summaries} | {name:11} | eager {times['eager_ms']:.4f} ms, "
                f"replay {times['replay_ms']:.4f} ms ({times['replay_ms'] / floor:.2f}x bytes), "
                f"in a row {times['in_a_row_ms']:.4f} ms" + (f", error {error:.2g}" if name == "ours" else ""),
                flush=True,
            )
    return found


def flex_decode(num_users: int, num_keys: int) -> Callable[[], Tensor]:
    """Return FlexAttention of one query a user over `num_keys` keys, padded to whole blocks and masked by length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    padded = -(-num_keys // 128) * 128
    length = torch.full((num_users,), num_keys, device="cuda", dtype=torch.int32)
    mask = create_block_mask(lambda b, _h, _q, key: key < length[b], num_users, None, 1, padded, device="cuda")
    query, key, value = (
        torch.randn(num_users, HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for tokens in (1, padded, padded)
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask)


def _times(run: Callable[[], Any]) -> dict[str, float]:
    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    in_a_row = do_bench_cudagraph(run, rep=20, return_mode="median")
    assert isinstance(in_a_row, float)
    return {"eager_ms": median_ms(run), "replay_ms": median_ms(graph.replay), "in_a_row_ms": in_a_row}


def _first_user(inputs: tuple[Any, ...]) -> torch.Tensor:
    return summary_append(*inputs, impl="torch").events[:1]


if __name__ == "__main__":
    from timing import measured_rates

    rows(measured_rates()[1])
