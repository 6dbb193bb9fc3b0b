"""The network itself: who sees whom, and that training's path is the state's path."""

import numpy as np
import pytest
import torch

from recsys_ksa.config import ModelConfig
from recsys_ksa.errors import ConfigError
from recsys_ksa.model.append import Arrivals, append_events, ask, empty_memory
from recsys_ksa.model.features import FeatureSchema, SideFeature
from recsys_ksa.model.network import Network
from recsys_ksa.model.place import place_histories
from recsys_ksa.model.rotary import rotary_table, summary_position


def network(seed: int = 0, features: FeatureSchema | None = None, **changes: object) -> Network:
    torch.manual_seed(seed)
    base = {"dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "feed_forward_dim": 24, "dropout": 0.0}
    config = ModelConfig.model_validate(base | {"layers": ["summary"] * 3, "chunk_size": 4} | changes)
    return Network(config, features or FeatureSchema(30)).double().eval()


def last_inputs(net: Network, items: torch.Tensor, gaps: torch.Tensor, first_position: int = 0) -> torch.Tensor:
    offsets = torch.tensor([0, len(items)])
    place = place_histories(net.config, offsets, torch.tensor([first_position]), torch.device("cpu"), net.dtype)
    return net.encode(net.embed(items, None, gaps, offsets.diff()), place).last_input


def test_the_future_never_changes_the_past(rng: np.random.Generator) -> None:
    net = network(window_chunks=1)
    items, gaps = (torch.from_numpy(rng.integers(1, 30, 60)) for _ in range(2))
    changed = items.clone()
    cut = int(rng.integers(1, 59))
    changed[cut:] = (items[cut:] - 1 + torch.from_numpy(rng.integers(1, 29, 60 - cut))) % 29 + 1  # each another
    before, after = last_inputs(net, items, gaps), last_inputs(net, changed, gaps)
    assert torch.equal(before[:cut], after[:cut])
    assert not torch.equal(before[cut:], after[cut:])


def test_old_events_reach_the_present_through_summaries_only(rng: np.random.Generator) -> None:
    items, gaps = (torch.from_numpy(rng.integers(1, 30, 60)) for _ in range(2))
    changed = items.clone()
    changed[0] = items[0] % 29 + 1
    for attention, expected in (("summary", True), ("window", False)):
        net = network(window_chunks=1, attention=attention)
        moved = last_inputs(net, items, gaps)[-1] - last_inputs(net, changed, gaps)[-1]
        assert bool(moved.abs().max() > 0) is expected


def test_a_wide_window_is_plain_causal_attention(rng: np.random.Generator) -> None:
    items, gaps = (torch.from_numpy(rng.integers(1, 30, 37)) for _ in range(2))
    wide, full = network(window_chunks=9), network(attention="full")
    state = {name: value for name, value in wide.state_dict().items() if name in full.state_dict()}
    full.load_state_dict(state)
    torch.testing.assert_close(last_inputs(wide, items, gaps), last_inputs(full, items, gaps), rtol=1e-12, atol=1e-12)


def test_training_on_a_tail_keeps_true_positions(rng: np.random.Generator) -> None:
    net = network(window_chunks=2)
    items, gaps = (torch.from_numpy(rng.integers(1, 30, 20)) for _ in range(2))
    # Rotary attention depends on distances only, so a shift by whole chunks changes nothing but rounding.
    torch.testing.assert_close(last_inputs(net, items, gaps, 400), last_inputs(net, items, gaps), rtol=1e-9, atol=1e-9)


def test_answers_of_a_state_equal_those_of_a_whole_pass(rng: np.random.Generator) -> None:
    net = network(window_chunks=1, own_item_bias=True)
    items, gaps = (torch.from_numpy(rng.integers(1, 30, 43)) for _ in range(2))
    offsets = torch.tensor([0, 43])
    place = place_histories(net.config, offsets, torch.tensor([0]), torch.device("cpu"), net.dtype)
    encoded = net.encode(net.embed(items, None, gaps, offsets.diff()), place)
    bucket = torch.full((43,), 9)
    layout = place.layouts["summary"]
    hidden = net.answer(encoded.last_input, bucket, encoded.rows[-1], layout, place.event_rotary, torch.tensor([42]))
    memory = append_events(net, [empty_memory(net)], Arrivals([43], items, None, gaps))[0]
    torch.testing.assert_close(ask(net, [memory], [9]), net.user_vectors(hidden), rtol=1e-10, atol=1e-12)


def test_leaving_out_summaries_that_no_event_sees_changes_no_event(rng: np.random.Generator) -> None:
    net = network(window_chunks=2)
    items, gaps = (torch.from_numpy(rng.integers(1, 30, 60)) for _ in range(2))
    offsets = torch.tensor([0, int(rng.integers(0, 13)), 60])
    inputs, summaries = [], []
    for unseen in (True, False):
        cpu = torch.device("cpu")
        place = place_histories(net.config, offsets, torch.zeros(2, dtype=torch.int64), cpu, net.dtype, unseen)
        inputs.append(net.encode(net.embed(items, None, gaps, offsets.diff()), place).last_input)
        summaries.append(len(place.summary_slot))
    torch.testing.assert_close(inputs[1], inputs[0], rtol=1e-12, atol=1e-12)
    assert summaries[1] <= summaries[0] - net.config.summaries_per_chunk * 2  # the window of the longer history


def test_gradients_reach_every_parameter() -> None:
    side = {"kind": SideFeature(4, np.arange(30, dtype=np.int32) % 4)}
    net = network(
        features=FeatureSchema(30, 3, side),
        side_features=["kind"],
        item_vectors="content",
        item_bias="learned",
        own_item_bias=True,
        window_chunks=1,
    ).train()
    items = torch.arange(60) % 29 + 1
    offsets = torch.tensor([0, 60])
    place = place_histories(net.config, offsets, torch.tensor([0]), torch.device("cpu"), net.dtype)
    encoded = net.encode(net.embed(items, items % 3, items % 40, offsets.diff()), place)
    hidden = net.answer(encoded.last_input, items % 40, encoded.rows[-1], place.layouts["summary"], place.event_rotary)
    hidden = torch.cat((hidden, net.start[None]))
    assert net.own_items is not None
    own = net.own_items(torch.tensor(3), torch.tensor(0), torch.tensor(90_000), torch.tensor(200_000))
    # The last block's summaries only give keys and values; their queries have no reader.
    scores = net.user_vectors(hidden) @ net.item_vectors().T
    (scores.logsumexp(-1).sum() + own).backward()
    unread = {"blocks.2.summary.query_gain"}
    missing = {name for name, value in net.named_parameters() if value.grad is None or not value.grad.abs().any()}
    assert missing <= unread | {"own_items.hidden.weight", "own_items.hidden.bias"}  # behind a zero output at first


def test_item_vectors_by_index_equal_rows_of_the_whole(rng: np.random.Generator) -> None:
    side = {"kind": SideFeature(4, rng.integers(0, 4, 30).astype(np.int32))}
    for kind in ("tied", "untied", "content"):
        net = network(features=FeatureSchema(30, 0, side), side_features=["kind"], item_vectors=kind)
        rows = torch.from_numpy(rng.integers(0, 30, 12))
        # TorchRec returns float32 from a lookup.
        torch.testing.assert_close(net.item_vectors(rows), net.item_vectors()[rows], rtol=1e-6, atol=1e-6)


def test_rotary_angles_are_exact_far_out() -> None:
    cos, _ = rotary_table(torch.tensor([100_003]), 8, torch.float64)
    expected = np.cos(100_003 * 10_000.0 ** (-np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(cos.flatten().numpy(), np.tile(expected, 2), atol=1e-12)


@pytest.mark.parametrize(
    ("slots", "k", "expected"),
    [(1, 8, [23]), (2, 8, [19, 23]), (3, 8, [17, 20, 23]), (4, 2, [16 // 8 * 2, 4, 4, 5])],
)
def test_summaries_carry_the_position_of_their_share_of_the_chunk(slots: int, k: int, expected: list[int]) -> None:
    got = summary_position(torch.full((slots,), 2), torch.arange(slots), k, slots).tolist()
    assert got == [2 * k + max(0, (j + 1) * k // slots - 1) for j in range(slots)]
    assert got == expected


def test_an_ordinal_clock_has_no_gaps_and_no_request_time() -> None:
    with pytest.raises(ConfigError, match="ordinal"):
        Network(ModelConfig(), FeatureSchema(5, clock="ordinal"))


def test_item_dropout_hides_items_in_training_only(rng: np.random.Generator) -> None:
    net = network(item_dropout=0.5, use_gap=False)
    items = torch.from_numpy(rng.integers(1, 30, 400))
    gaps, lengths = torch.zeros_like(items), torch.tensor([400])
    shown, unknown = (net.embed(each, None, gaps, lengths) for each in (items, torch.zeros_like(items)))
    trained = net.train().embed(items, None, gaps, lengths)
    hidden = (trained == unknown).all(-1)
    assert torch.equal(trained[~hidden], shown[~hidden])
    assert 100 < int(hidden.sum()) < 300


def test_side_features_must_be_in_the_data() -> None:
    with pytest.raises(ConfigError, match="brand"):
        Network(ModelConfig(side_features=("brand",)), FeatureSchema(5))
