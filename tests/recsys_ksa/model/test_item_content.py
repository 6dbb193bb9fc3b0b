"""Lists of categories are averaged and vectors projected, the same in training, in a batch and in an append."""

from typing import Any

import numpy as np
import pytest
import torch

from recsys_ksa.config import ModelConfig
from recsys_ksa.data.jagged_arrays import offsets_of
from recsys_ksa.errors import ConfigError
from recsys_ksa.model.append import Arrivals, append_events, ask, empty_memory
from recsys_ksa.model.features import FeatureSchema, MultiFeature, SideFeature
from recsys_ksa.model.fingerprint import state_fingerprint
from recsys_ksa.model.network import Network

ITEMS, GENRES, LENGTH = 30, 7, 5


def schema(rng: np.random.Generator) -> FeatureSchema:
    counts = rng.integers(0, 4, ITEMS)
    counts[0] = 0
    lists = MultiFeature(offsets_of(counts), rng.integers(1, GENRES, counts.sum()).astype(np.int32), GENRES)
    vectors = rng.normal(size=(ITEMS, LENGTH)).astype(np.float32) * 7
    vectors[[0, 3]] = 0
    side = {"brand": SideFeature(4, rng.integers(0, 4, ITEMS).astype(np.int32))}
    return FeatureSchema(ITEMS, 0, side, multi={"genres": lists}, vectors={"text": vectors})


def build(features: FeatureSchema, **changes: Any) -> Network:
    base = {"dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "feed_forward_dim": 24, "chunk_size": 4}
    side = {"side_features": ["genres", "brand", "text"], "window_chunks": 1, "dropout": 0.0}
    return Network(ModelConfig.model_validate(base | side | changes), features).double().eval()


def plain(network: Network, item: int) -> torch.Tensor:
    """An item's input, by hand, without its event's gap."""
    features, embedding = network.features, network.embedding
    row = (
        embedding._table("item").weight[item]
        + embedding._table("side_brand").weight[int(features.side["brand"].category[item])]
    )
    lists = features.multi["genres"]
    own = lists.index[lists.offsets[item] : lists.offsets[item + 1]].tolist()
    if own:
        row = row + embedding._table("multi_genres").weight[own].mean(0)
    vector = torch.from_numpy(features.vectors["text"][item]).double()
    if vector.any():
        row = row + (vector / vector.norm()) @ embedding.item_content.weight["text"]
    return row


@pytest.mark.parametrize("counts", [[0], [1], [3, 0, 5], [0, 0, 4]])
def test_an_input_is_the_sum_of_what_is_known_of_an_item(counts: list[int], rng: np.random.Generator) -> None:
    network = build(schema(rng), use_gap=False)
    items = torch.from_numpy(rng.integers(0, ITEMS, sum(counts)))
    expected = torch.stack([plain(network, item) for item in items.tolist()]) * 4 if len(items) else torch.zeros(0, 16)
    for training in (False, True):  # whole tables, and TorchRec's collection
        found = network.train(training).embed(items, None, items, torch.tensor(counts))
        torch.testing.assert_close(found, expected.to(found), rtol=0, atol=1e-6)


def test_content_is_part_of_what_items_are_scored_by(rng: np.random.Generator) -> None:
    network = build(schema(rng), item_vectors="content")
    everyone = network.embedding.all_candidates()
    items = torch.from_numpy(rng.integers(0, ITEMS, 50))
    for training in (False, True):
        found = network.train(training).embedding.candidates(items)
        torch.testing.assert_close(found, everyone[items].to(found), rtol=0, atol=1e-6)
    vector = torch.from_numpy(network.features.vectors["text"][7]).double()
    reach = (vector / vector.norm()).abs() @ network.embedding.item_content.weight["text"].detach().abs()
    # Vectors get their length in float32: a sum of LENGTH squares, a root and a quotient round.
    bound = (LENGTH / 2 + 3) * 2**-24 * float(reach.max())
    torch.testing.assert_close(everyone[7], plain(network, 7), rtol=0, atol=bound)


def test_gradients_reach_categories_and_vectors(rng: np.random.Generator) -> None:
    network = build(schema(rng)).float().train()
    items = torch.arange(ITEMS)
    network.embed(items, None, items, torch.tensor([ITEMS])).square().sum().backward()
    used = np.unique(network.features.multi["genres"].index)
    gradient = network.embedding._table("multi_genres").weight.grad
    assert gradient is not None
    assert np.array_equal(np.flatnonzero(gradient.abs().sum(-1).numpy()), used)
    assert float(network.embedding.item_content.weight["text"].grad.abs().sum()) > 0


@pytest.mark.parametrize("step", [1, 2, 9])
def test_append_equals_one_pass(step: int, rng: np.random.Generator) -> None:
    network = build(schema(rng), calendar=["hour"])
    items, gaps = (torch.from_numpy(rng.integers(0, high, 41)) for high in (ITEMS, 40))
    hours = {"hour": torch.from_numpy(rng.integers(1, 25, 41))}
    whole = append_events(network, [empty_memory(network)], Arrivals([41], items, None, gaps, hours))[0]
    memory = empty_memory(network)
    for at in range(0, 41, step):
        rows = slice(at, min(at + step, 41))
        own = {name: column[rows] for name, column in hours.items()}
        arrivals = Arrivals([len(items[rows])], items[rows], None, gaps[rows], own)
        memory = append_events(network, [memory], arrivals)[0]
    a, b = ask(network, [memory], [3]), ask(network, [whole], [3])
    assert float((a - b).norm() / b.norm()) <= 1e-10


def test_states_depend_on_what_items_are_said_to_be(rng: np.random.Generator) -> None:
    features = schema(rng)
    torch.manual_seed(0)
    one = build(features)
    other = {name: vectors + 1 for name, vectors in features.vectors.items()}
    torch.manual_seed(0)
    two = build(FeatureSchema(ITEMS, 0, features.side, multi=features.multi, vectors=other))
    assert state_fingerprint(one) != state_fingerprint(two)


def test_a_feature_the_data_set_lacks_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(
        ConfigError, match=r"expected side features of the data set \(brand, genres, text\), got 'nope'"
    ):
        build(schema(rng), side_features=["nope"])
