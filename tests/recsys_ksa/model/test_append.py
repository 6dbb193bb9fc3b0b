"""The core promise: for any way of cutting a history into arrivals, state and answers equal those of one pass."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memories import EXACT, all_rows, arrive, build, draw_history, relative, small_config

from recsys_ksa.config import ModelConfig
from recsys_ksa.errors import StateError
from recsys_ksa.model.append import append_events, ask, empty_memory, replay, replay_start
from recsys_ksa.model.network import Network
from recsys_ksa.model.state import LayerState, Memory, SharedRows, full_kv_bytes, kv_bytes


@st.composite
def configs(draw: st.DrawFn, max_visible: bool = True) -> ModelConfig:
    return small_config(
        chunk_size=draw(st.integers(2, 6)),
        window_chunks=draw(st.integers(0, 3)),
        summaries_per_chunk=draw(st.integers(1, 3)),
        max_visible_chunks=draw(st.none() | st.integers(0, 3)) if max_visible else None,
        layers=draw(st.lists(st.sampled_from(["summary", "summary", "full"]), min_size=1, max_size=3)),
        attention=draw(st.sampled_from(["summary", "summary", "summary", "window", "full"])),
        item_bias=draw(st.sampled_from(["none", "learned"])),
    )


def in_one_pass(network: Network, history: tuple[torch.Tensor, ...], impl: str = "auto") -> Memory:
    memory = empty_memory(network)
    return append_events(network, [memory], arrive(history), impl)[0] if len(history[0]) else memory


def in_arrivals(network: Network, history: tuple[torch.Tensor, ...], rng: np.random.Generator) -> Memory:
    memory, at, length = empty_memory(network), 0, len(history[0])
    while at < length:
        step = int(rng.integers(1, 12))
        memory = append_events(network, [memory], arrive(tuple(column[at : at + step] for column in history)))[0]
        at += step
    return memory


@given(config=configs(), length=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
def test_append_equals_one_pass(config: ModelConfig, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    network, history = build(config, seed), draw_history(rng, length)
    whole, cut = in_one_pass(network, history), in_arrivals(network, history, rng)
    assert relative(all_rows(cut), all_rows(whole)) <= EXACT
    bucket = [int(rng.integers(0, 40))]
    assert relative(ask(network, [cut], bucket), ask(network, [whole], bucket)) <= EXACT


@given(config=configs(), chunks=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_append_equals_one_pass_when_the_last_chunk_is_full(config: ModelConfig, chunks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    network, history = build(config, seed), draw_history(rng, chunks * config.chunk_size)
    whole, cut = in_one_pass(network, history), in_arrivals(network, history, rng)
    assert relative(all_rows(cut), all_rows(whole)) <= EXACT
    assert relative(ask(network, [cut], [3]), ask(network, [whole], [3])) <= EXACT


@given(config=configs(), lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_a_batch_of_users_equals_its_users_one_by_one(config: ModelConfig, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = build(config, seed)
    histories = [draw_history(rng, length) for length in lengths]
    more = [draw_history(rng, int(rng.integers(1, 20))) for _ in lengths]
    together = append_events(network, [empty_memory(network)] * len(lengths), arrive(*histories))
    together = append_events(network, together, arrive(*more))
    buckets = rng.integers(0, 40, len(lengths)).tolist()
    answers = ask(network, [*together, empty_memory(network)], [*buckets, 0])
    for user, (first, second) in enumerate(zip(histories, more)):
        alone = append_events(network, [in_one_pass(network, first)], arrive(second))[0]
        assert relative(all_rows(together[user]), all_rows(alone)) <= EXACT
        assert relative(answers[user : user + 1], ask(network, [alone], [buckets[user]])) <= EXACT
    assert relative(answers[-1:], ask(network, [empty_memory(network)], [0])) <= EXACT


@given(config=configs(max_visible=False), length=st.integers(1, 90), seed=st.integers(0, 2**32 - 1))
def test_event_rows_are_rebuilt_exactly_from_stored_summaries(config: ModelConfig, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    network, history = build(config, seed), draw_history(rng, length)
    whole = in_one_pass(network, history)
    cold = Memory(
        whole.num_events,
        tuple(
            layer
            if layer.kind == "full"
            else LayerState("summary", SharedRows((), layer.events.whole()[:0]), layer.summaries)
            for layer in whole.layers
        ),
        torch.zeros_like(whole.last_input),
    )
    start = replay_start(config, length)
    rebuilt = replay(network, cold, arrive(tuple(column[start:] for column in history)))
    assert relative(all_rows(rebuilt), all_rows(whole)) <= EXACT
    assert relative(ask(network, [rebuilt], [5]), ask(network, [whole], [5])) <= EXACT


@given(config=configs(), length=st.integers(0, 120))
def test_state_bytes_equal_the_formula(config: ModelConfig, length: int) -> None:
    network = build(config, 0)
    memory = in_one_pass(network, draw_history(np.random.default_rng(0), length))
    assert sum(layer.nbytes for layer in memory.layers) == kv_bytes(config, length, bytes_per_value=8)


def test_bytes_formula_as_written_in_the_design() -> None:
    config = small_config(chunk_size=8, window_chunks=3, summaries_per_chunk=2, layers=["summary"] * 4)
    n, k, w, m = 1_003, 8, 3, 2
    c = (n - 1) // k
    row = 2 * config.num_kv_heads * config.head_dim * 4
    assert kv_bytes(config, n) == 4 * row * (m * (n // k) + n - k * max(0, c - w))
    assert full_kv_bytes(config, n) == 4 * row * n


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5)])
def test_append_equals_one_pass_in_float32(dtype: torch.dtype, bound: float, rng: np.random.Generator) -> None:
    config = small_config(chunk_size=8, window_chunks=2, layers=["summary"] * 4)
    network = build(config, int(rng.integers(2**32))).to(dtype)
    history = draw_history(rng, 300)
    whole, cut = in_one_pass(network, history), in_arrivals(network, history, rng)
    assert relative(all_rows(cut), all_rows(whole)) <= bound
    assert relative(ask(network, [cut], [3]), ask(network, [whole], [3])) <= bound


def test_bf16_states_stay_within_their_bound(rng: np.random.Generator) -> None:
    config = small_config(chunk_size=8, window_chunks=2, layers=["summary"] * 3)
    network = build(config, int(rng.integers(2**32))).float()
    network.precision = "bf16"
    history = draw_history(rng, 150)
    whole, cut = in_one_pass(network, history), in_arrivals(network, history, rng)
    assert whole.layers[0].events.tail.dtype == torch.bfloat16
    assert relative(ask(network, [cut], [3]), ask(network, [whole], [3])) <= 2e-2


def test_old_state_stays_valid_and_segments_are_shared(rng: np.random.Generator) -> None:
    config = small_config(chunk_size=2, window_chunks=1, layers=["summary", "full"])
    network, history = build(config, 1), draw_history(rng, 400)
    before = in_one_pass(network, tuple(column[:300] for column in history))
    copy = all_rows(before).clone()
    after = append_events(network, [before], arrive(tuple(column[300:] for column in history)))[0]
    assert torch.equal(all_rows(before), copy)
    old, new = before.layers[0].summaries.segments, after.layers[0].summaries.segments
    assert len(old) == 150 // 64
    assert all(a is b for a, b in zip(old, new))
    assert all(a is b for a, b in zip(before.layers[1].events.segments, after.layers[1].events.segments))


def test_asking_never_appends(rng: np.random.Generator) -> None:
    network = build(small_config(chunk_size=4, window_chunks=1), 2)
    memory = in_one_pass(network, draw_history(rng, 33))
    copy = all_rows(memory).clone()
    first = ask(network, [memory], [7])
    ask(network, [memory], [30])
    assert torch.equal(all_rows(memory), copy)
    assert torch.equal(ask(network, [memory], [7]), first)


def test_request_time_changes_the_answer_only(rng: np.random.Generator) -> None:
    network = build(small_config(chunk_size=4, window_chunks=1), 3)
    memory = in_one_pass(network, draw_history(rng, 20))
    assert not torch.allclose(ask(network, [memory], [1]), ask(network, [memory], [25]))


def test_replay_refuses_the_wrong_events(rng: np.random.Generator) -> None:
    network = build(small_config(chunk_size=4, window_chunks=1), 4)
    history = draw_history(rng, 50)
    memory = in_one_pass(network, history)
    with pytest.raises(StateError, match="expected the"):
        replay(network, memory, arrive(tuple(column[-1:] for column in history)))
