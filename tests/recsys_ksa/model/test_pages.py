"""Memories in pages are memories: the same rows and answers, whatever is appended to what."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memories import EXACT, all_rows, arrive, build, draw_history, relative, small_config

from recsys_ksa.config import ModelConfig
from recsys_ksa.errors import ConfigError, PoolFullError, StateError
from recsys_ksa.model.append import Arrivals, append_events, ask, empty_memory
from recsys_ksa.model.network import Network
from recsys_ksa.model.pages import PAGE_ROWS, PagePool
from recsys_ksa.model.state import LayerState, Memory, SharedRows, UserMemory


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    return small_config(
        chunk_size=draw(st.integers(2, 6)),
        window_chunks=draw(st.integers(0, 3)),
        summaries_per_chunk=draw(st.integers(1, 3)),
        max_visible_chunks=draw(st.none() | st.integers(0, 3)),
        layers=["summary"] * draw(st.integers(1, 3)),
        attention=draw(st.sampled_from(["summary", "summary", "window"])),
    )


def make_pool(network: Network, pages: int = 400) -> PagePool:
    config = network.config
    page = 2 * len(config.layers) * PAGE_ROWS * config.num_kv_heads * config.head_dim * 8
    return PagePool(config, pages * page, torch.float64, torch.float64, torch.device("cpu"))


@given(config=configs(), steps=st.integers(3, 10), seed=st.integers(0, 2**32 - 1))
def test_pages_equal_tensors(config: ModelConfig, steps: int, seed: int) -> None:
    """Random users of a growing crowd get events, at times twice on one earlier memory; all stay what they were."""
    rng = np.random.default_rng(seed)
    network = build(config, seed)
    pool = make_pool(network)
    plain: list[UserMemory] = [empty_memory(network)]
    paged: list[UserMemory] = [pool.empty]
    for _ in range(steps):
        chosen = rng.integers(0, len(plain), int(rng.integers(1, 5))).tolist()  # one memory maybe twice
        more = arrive(*[draw_history(rng, int(rng.integers(1, 30))) for _ in chosen])
        plain += append_events(network, [plain[at] for at in chosen], more)
        paged += append_events(network, [paged[at] for at in chosen], more, pool=pool)
        gone = int(rng.integers(1, len(plain)))  # the first, without events, stays
        del plain[gone], paged[gone]
    for one, other in zip(plain, paged):
        assert relative(all_rows(other), all_rows(one)) <= EXACT
        assert relative(other.last_input[None], one.last_input[None]) <= EXACT
    buckets = rng.integers(0, 40, len(plain)).tolist()
    assert relative(ask(network, paged, buckets, pool=pool), ask(network, plain, buckets)) <= EXACT


@given(config=configs(), length=st.integers(0, 90), seed=st.integers(0, 2**32 - 1))
def test_what_is_held_is_what_was_given(config: ModelConfig, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = build(config, seed)
    pool = make_pool(network)
    plain: UserMemory = empty_memory(network)
    if length:
        plain = append_events(network, [plain], arrive(draw_history(rng, length)))[0]
    held = pool.hold(plain)
    assert pool.hold(held) is held
    assert torch.equal(all_rows(held), all_rows(plain)) if length else not len(all_rows(held))
    more = arrive(draw_history(rng, int(rng.integers(1, 300))))  # beyond 256 the other way is taken
    grown, expected = append_events(network, [held], more, pool=pool), append_events(network, [plain], more)
    assert relative(all_rows(grown[0]), all_rows(expected[0])) <= EXACT


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_pages_on_a_gpu_equal_tensors(dtype: torch.dtype, bound: float, seed: int, rng: np.random.Generator) -> None:
    """The kernel on pages against PyTorch on tensors, for users of 1 to 3,000 events, twice appended to."""
    config = ModelConfig(dim=64, num_heads=2, num_kv_heads=2, head_dim=32, feed_forward_dim=128, chunk_size=8,
                         window_chunks=4, layers=("summary",) * 3, dropout=0.0)  # fmt: skip
    network = build(config, seed % 2**31).float().cuda()
    network.precision = "bf16" if dtype is torch.bfloat16 else "float32"
    pool = PagePool(config, 1 << 28, network.state_dtype, network.dtype, network.start.device)
    lengths = [1, 7, 8, 9, 3000, *rng.integers(1, 500, 20).tolist()]

    def arrivals(counts: list[int]) -> Arrivals:
        part = arrive(*[draw_history(rng, count) for count in counts])
        assert part.event_type is not None
        return Arrivals(part.counts, part.item_index.cuda(), part.event_type.cuda(), part.gap_bucket.cuda())

    plain = append_events(network, [empty_memory(network)] * len(lengths), arrivals(lengths), "torch")
    paged: list[UserMemory] = [pool.hold(memory) for memory in plain]
    for most in (2, 40):
        more = arrivals(rng.integers(1, most, len(lengths)).tolist())
        plain = append_events(network, plain, more, "torch")
        paged = append_events(network, paged, more, "triton", pool)
    buckets = rng.integers(0, 40, len(lengths)).tolist()
    assert relative(ask(network, paged, buckets, "triton", pool=pool), ask(network, plain, buckets, "torch")) < bound
    for one, other in zip(plain, paged):
        assert relative(all_rows(other).float(), all_rows(one).float()) < bound


def test_pages_come_back_and_a_full_pool_refuses(rng: np.random.Generator) -> None:
    config = small_config(chunk_size=4, window_chunks=2, layers=["summary", "summary"])
    network = build(config, 0)
    pool = make_pool(network, pages=12)
    memory: UserMemory = pool.empty
    for _ in range(60):  # the window moves on: its old pages are dealt out again
        memory = append_events(network, [memory], arrive(draw_history(rng, 5)), pool=pool)[0]
    before = all_rows(memory)
    with pytest.raises(PoolFullError, match=r"expected .* free pages for 4 users' events, got .* of 12"):
        append_events(network, [pool.empty] * 4, arrive(*[draw_history(rng, 40) for _ in range(4)]), pool=pool)
    assert torch.equal(all_rows(memory), before)
    assert memory.nbytes == pool.page_bytes * (12 - pool.num_free)
    del memory
    gc.collect()
    assert pool.num_free == 12


def test_what_cannot_be_held_is_refused(rng: np.random.Generator) -> None:
    config = small_config(chunk_size=4, window_chunks=2, layers=["summary", "full"])
    with pytest.raises(ConfigError, match="expected summary layers alone"):
        make_pool(build(config, 0))
    with pytest.raises(ConfigError, match="expected room for a page"):
        make_pool(build(small_config(layers=["summary"]), 0), pages=0)
    network = build(small_config(chunk_size=4, window_chunks=2, layers=["summary"]), 0)
    warm = append_events(network, [empty_memory(network)], arrive(draw_history(rng, 30)))[0]
    nothing = SharedRows((), warm.layers[0].events.tail[:0])
    cold = Memory(30, tuple(LayerState("summary", nothing, layer.summaries) for layer in warm.layers), warm.last_input)
    with pytest.raises(StateError, match="Replay a cold state first"):
        make_pool(network).hold(cold)
