"""Few events go through NumPy: the same states and answers as torch's pass over many, by the same visibility rule."""

from collections.abc import Callable
from copy import deepcopy
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ksa_kernels.summary_attention.reference import Tokens, visible
from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.model import array_block, few_events
from recsys_ksa.model.append import Arrivals, append_events, ask, empty_memory
from recsys_ksa.model.features import FeatureSchema, SideFeature
from recsys_ksa.model.network import Network
from recsys_ksa.model.sight import event_sight, summary_sight
from recsys_ksa.model.state import Memory

NUM_ITEMS = 40
KINDS: list[LayerKind] = ["summary", "summary", "full"]
EXACT = 1e-12
"""Row-norm relative bound in float64."""


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    num_kv_heads = draw(st.integers(1, 2))
    return ModelConfig(
        dim=12,
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * draw(st.integers(1, 2)),
        head_dim=8,
        feed_forward_dim=20,
        chunk_size=draw(st.integers(2, 6)),
        window_chunks=draw(st.integers(0, 3)),
        summaries_per_chunk=draw(st.integers(1, 3)),
        max_visible_chunks=draw(st.none() | st.integers(0, 3)),
        layers=tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))),
        attention=draw(st.sampled_from(["summary", "summary", "summary", "window", "full"])),
        side_features=("kind",),
        item_vectors=draw(st.sampled_from(["tied", "untied", "content"])),
        use_request_time=draw(st.booleans()),
    )


def build(config: ModelConfig, seed: int) -> Network:
    """A network whose every parameter is random: gains of 1 would hide a gain left out."""
    torch.manual_seed(seed)
    kinds = SideFeature(4, np.arange(NUM_ITEMS, dtype=np.int32) % 4)
    network = Network(config, FeatureSchema(NUM_ITEMS, 3, {"kind": kinds})).double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return network


def arrive(rng: np.random.Generator, *counts: int) -> Arrivals:
    item, kind, gap = (torch.from_numpy(rng.integers(0, high, sum(counts))) for high in (NUM_ITEMS, 3, 40))
    return Arrivals(list(counts), item, kind, gap)


def remember(network: Network, rng: np.random.Generator, lengths: list[int]) -> list[Memory]:
    """Memories of new histories, by torch."""
    empty = empty_memory(network)
    return [append_events(network, [empty], arrive(rng, n), "torch")[0] if n else empty for n in lengths]


def differences(got: Memory, expected: Memory) -> float:
    """The largest difference of a row, relative to its norm; rows must be of the same shapes and number."""
    assert got.num_events == expected.num_events
    worst = 0.0
    rows = [(got.last_input[None], expected.last_input[None])]
    for mine, theirs in zip(got.layers, expected.layers, strict=True):
        assert mine.kind == theirs.kind
        rows += [(mine.events.whole(), theirs.events.whole()), (mine.summaries.whole(), theirs.summaries.whole())]
    for a, b in rows:
        assert a.shape == b.shape
        if a.numel():
            a, b = a.flatten(1), b.flatten(1)
            worst = max(worst, float(((a - b).norm(dim=1) / b.norm(dim=1)).max()))
    return worst


@given(
    config=configs(),
    users=st.lists(st.tuples(st.integers(0, 40), st.integers(1, few_events.MOST_EVENTS)), min_size=1, max_size=3),
    large=st.sampled_from([array_block.LARGE, 300, 0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_few_events_leave_the_states_that_torch_does(
    config: ModelConfig, users: list[tuple[int, int]], large: int, seed: int
) -> None:
    rng, network = np.random.default_rng(seed), build(config, seed)
    memories = remember(network, rng, [length for length, _ in users])
    arrivals = arrive(rng, *(new for _, new in users))
    expected = append_events(network, memories, arrivals, "torch")
    with mock.patch.object(array_block, "LARGE", large):  # small products are NumPy's, large ones torch's
        got = append_events(network, memories, arrivals)
    for mine, theirs in zip(got, expected, strict=True):
        assert differences(mine, theirs) <= EXACT


@given(config=configs(), lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_questions_get_the_answers_that_torch_gives(config: ModelConfig, lengths: list[int], seed: int) -> None:
    rng, network = np.random.default_rng(seed), build(config, seed)
    memories, buckets = remember(network, rng, lengths), rng.integers(0, 40, len(lengths)).tolist()
    torch.testing.assert_close(
        ask(network, memories, buckets), ask(network, memories, buckets, "torch"), rtol=1e-10, atol=1e-12
    )


@given(config=configs(), num_events=st.integers(1, 60))
def test_sights_are_the_visibility_rule(config: ModelConfig, num_events: int) -> None:
    k, m = config.chunk_size, config.summaries_per_chunk
    event, chunk = torch.arange(num_events), torch.arange(num_events // k)
    slot = torch.arange(m).repeat(len(chunk))
    tokens = Tokens(
        torch.arange(num_events + len(slot)) >= num_events,
        torch.cat((event // k, chunk.repeat_interleave(m))),
        torch.cat((event, slot)),
    )
    config = config.model_copy(update={"attention": "summary"})
    seen = torch.zeros(len(tokens.chunk), len(tokens.chunk), dtype=torch.bool)
    sights = [event_sight(config, "summary", at) for at in range(num_events)]
    sights += [summary_sight(config, at // m, at % m) for at in range(len(slot))]
    for query, sight in enumerate(sights):
        seen[query, sight.events[0] : sight.events[1]] = True
        seen[query, num_events + sight.summaries[0] : num_events + sight.summaries[1]] = True
    assert torch.equal(seen, visible(tokens, tokens, config.window_chunks, config.max_visible_chunks))


def small_network(seed: int) -> Network:
    return build(ModelConfig(dim=12, num_heads=2, num_kv_heads=1, head_dim=8, chunk_size=4, window_chunks=1), seed)


def train_a_step(network: Network) -> Network:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    return network


def load_other_weights(network: Network) -> Network:
    network.load_state_dict(small_network(8).state_dict())
    return network


def assign_other_weights(network: Network) -> Network:
    network.load_state_dict(small_network(8).state_dict(), assign=True)
    return network


@pytest.mark.parametrize(
    "change",
    [
        train_a_step,
        load_other_weights,
        assign_other_weights,
        lambda network: network.to(torch.float32),
        lambda network: train_a_step(deepcopy(network)),
    ],
)
def test_weights_that_changed_are_the_ones_used(change: Callable[[Network], Network], rng: np.random.Generator) -> None:
    network = small_network(7)
    append_events(network, [empty_memory(network)], arrive(rng, 1))  # looks the arrays up
    network = change(network)
    memories, arrivals = remember(network, rng, [9]), arrive(rng, 2)
    mine, theirs = (append_events(network, memories, arrivals, impl)[0] for impl in ("auto", "torch"))
    assert differences(mine, theirs) <= (EXACT if network.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(
    ("count", "precision", "impl", "expected"),
    [
        (1, "float32", "auto", True),
        (few_events.MOST_EVENTS, "float32", "auto", True),
        (few_events.MOST_EVENTS + 1, "float32", "auto", False),
        (1, "bf16", "auto", False),
        (1, "float32", "torch", False),
        (1, "float32", "reference", False),
    ],
)
def test_an_implementation_asked_for_by_name_is_the_one_used(
    count: int, precision: str, impl: str, expected: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small_network(7).float()
    network.precision = "bf16" if precision == "bf16" else "float32"
    calls: list[int] = []
    real = few_events.append_few

    def spy(*args: object, **kwargs: object) -> list[Memory]:
        calls.append(1)
        return real(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(few_events, "append_few", spy)
    append_events(network, [empty_memory(network)], arrive(rng, count), impl)
    assert bool(calls) is expected


def test_states_keep_no_memory_but_their_rows(rng: np.random.Generator) -> None:
    network = build(ModelConfig(dim=12, num_heads=2, num_kv_heads=1, head_dim=8, chunk_size=2, window_chunks=1), 7)
    memories = remember(network, rng, [31, 64])
    for _ in range(5):
        memories = append_events(network, memories, arrive(rng, 1, 1))
    for layer in (layer for memory in memories for layer in memory.layers):
        for part in (*layer.events.parts(), *layer.summaries.parts()):
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
