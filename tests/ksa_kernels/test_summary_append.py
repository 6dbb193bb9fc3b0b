import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ksa_kernels.errors import ShapeError
from ksa_kernels.summary_append import PagedCache, summary_append
from ksa_kernels.summary_append.cache import Pages
from ksa_kernels.summary_attention.api import summary_attention
from ksa_kernels.testing import error_budget, make_layout, make_qkv, relative_error

HERE = Path(__file__).parent


def states(rng: random.Random, dtype=torch.float32, longest=90, device="cpu"):
    """Draw users with new events, and a cache of shuffled pages that holds what they see."""
    k, window = rng.choice([2, 3, 8]), rng.choice([0, 1, 3, None])
    lengths = [rng.choice([1, k, rng.randint(1, longest), rng.randint(1, longest)]) for _ in range(3)]
    starts = [max(0, n - rng.randint(0, 9)) for n in lengths]
    rule = {
        "chunk_size": k,
        "summaries_per_chunk": rng.choice([0, 1, 2]),
        "window_chunks": window,
        "max_visible_chunks": rng.choice([None, 2]),
        "query_start": starts,
        "key_start": [0 if window is None else max(0, start // k - window) * k for start in starts],
    }
    layout = make_layout(lengths, **rule).to(device)
    events, summaries = make_qkv(layout, num_heads=4, num_kv_heads=2, head_dim=16, dtype=dtype, seed=rng.randint(0, 99))
    ring = -(-max(lengths) // 4) + 1
    cache = PagedCache(Pages.allocate(3, ring, 4, 2, 16, events.key), Pages.allocate(3, 2 * ring, 2, 2, 16, events.key))
    for pages in (cache.events, cache.summaries):
        shuffled = torch.randperm(pages.table.numel(), generator=torch.Generator().manual_seed(1))
        pages.table.copy_(shuffled.view_as(pages.table))
    cache.write_all(layout, events[1:], summaries[1:])
    return layout, events, summaries, cache


def check(rng: random.Random, impl: str, longest: int = 90, dtype=torch.float32, device="cpu") -> None:
    layout, events, summaries, cache = states(rng, dtype, longest, device)
    expected = summary_attention(events, summaries, layout, impl="reference")
    actual = summary_append(events.query, summaries.query, cache, layout, impl=impl)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) <= error_budget(dtype), (layout, impl)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_pages_give_what_contiguous_keys_give(impl, rng):
    for _ in range(6):
        check(rng, impl)


def test_triton_reads_pages_in_place():
    pytest.importorskip("triton")
    script = f"""
import random, sys
sys.path.insert(0, {str(HERE)!r})
import torch
from test_summary_append import check
from ksa_kernels.summary_append import triton_append
torch.set_num_threads(1)
rng = random.Random(8)
for splits in (1, 2, 4):
    triton_append.MOST_SPLITS = splits
    check(rng, "triton", longest=40)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_writing_what_arrives_into_a_small_ring_is_enough():
    rule = {"chunk_size": 4, "summaries_per_chunk": 1, "window_chunks": 1}
    whole = make_layout([30, 9], **rule)
    events, summaries = make_qkv(whole, head_dim=16, dtype=torch.float32)
    expected = summary_attention(events, summaries, whole)
    # a ring of three pages of four holds a window of one chunk, the chunk itself and the one being overwritten
    cache = PagedCache(Pages.allocate(2, 3, 4, 2, 16, events.key), Pages.allocate(2, 8, 1, 2, 16, summaries.key))
    for step in range(30):
        lengths = [step + 1, min(step + 1, 9)]
        starts = [step, min(step, 9)]
        key_starts = [max(0, start // 4 - 1) * 4 for start in starts]
        layout = make_layout(lengths, query_start=starts, key_start=key_starts, **rule)
        rows = torch.cat([torch.arange(s, n) + first for s, n, first in zip(starts, lengths, (0, 30), strict=True)])
        closed = [range(s // 4, n // 4) for s, n in zip(starts, lengths, strict=True)]
        slots = torch.tensor([c + first for chunks, first in zip(closed, (0, 7), strict=True) for c in chunks]).long()
        cache.write(layout, (events.key[rows], events.value[rows]), (summaries.key[slots], summaries.value[slots]))
        out = summary_append(events.query[rows], summaries.query[slots], cache, layout)
        assert relative_error(out.events, expected.events[rows]) < 1e-5
        assert relative_error(out.summaries, expected.summaries[slots]) < 1e-5


def test_what_disagrees_with_the_layout_is_refused(rng):
    layout, events, summaries, cache = states(rng)
    with pytest.raises(ShapeError, match=r"event_query must be \[\d+, H, D\]"):
        summary_append(events.query[:-1], summaries.query, cache, layout)
    with pytest.raises(ShapeError, match=r"dtype torch\.float32: got torch\.float64"):
        summary_append(events.query.double(), summaries.query, cache, layout)
    few = PagedCache(Pages.allocate(2, 9, 4, 2, 16, events.key), cache.summaries)
    with pytest.raises(ShapeError, match=r"one row a user: expected 3, got 2"):
        summary_append(events.query, summaries.query, few, layout)
    small = PagedCache(Pages.allocate(1, 1, 1, 1, 16, events.key), Pages.allocate(1, 9, 1, 1, 16, events.key))
    long = make_layout([50], chunk_size=4, summaries_per_chunk=0, window_chunks=2, query_start=[49], key_start=[40])
    with pytest.raises(ShapeError, match=r"cache\.events\.table must have 11 pages a user .* got 1 pages of 1"):
        summary_append(events.query[:1], summaries.query[:0], small, long)
