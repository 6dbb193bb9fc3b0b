"""Validation's NDCG equals a plain reading of the ranking, ties against us."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from recsys_ksa.config import RunConfig
from recsys_ksa.data.assemble import questions_batch
from recsys_ksa.data.dataset import Dataset
from recsys_ksa.data.spans import validation_span
from recsys_ksa.model.network import Network
from recsys_ksa.train.run_files import feature_schema
from recsys_ksa.train.validation import Validation, ndcg_at

MakeConfig = Callable[..., RunConfig]


def plain_ndcg(scores: list[float], targets: set[int], k: int) -> float:
    # Sorted by score; of equal scores what is no target goes first.
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item in targets))
    gains = [1 / math.log2(place + 2) for place, item in enumerate(order[:k]) if item in targets]
    ideal = [1 / math.log2(place + 2) for place in range(min(len(targets), k))]
    return sum(gains) / sum(ideal) if targets else 0.0


def test_ndcg_is_its_definition_with_ties_and_sets(rng: np.random.Generator) -> None:
    scores = torch.from_numpy(rng.integers(0, 6, (40, 15)).astype(np.float32))
    wanted = [set(rng.choice(15, rng.integers(0, 7), replace=False).tolist()) for _ in range(40)]
    question = torch.tensor([q for q, items in enumerate(wanted) for _ in items])
    item = torch.tensor([item for items in wanted for item in sorted(items)])
    expected = [plain_ndcg(scores[q].tolist(), wanted[q], 4) for q in range(40)]
    assert ndcg_at(scores, question, item, 4).tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_scores_are_worth_nothing() -> None:
    scores = torch.zeros(1, 30)
    assert float(ndcg_at(scores, torch.tensor([0]), torch.tensor([7]), 10)) == 0.0
    assert float(ndcg_at(scores * torch.nan, torch.tensor([0]), torch.tensor([7]), 10)) == 0.0


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_validation_ranks_as_a_plain_loop_does(
    exclude_seen: bool, own: bool, dataset: Dataset, make_config: MakeConfig
) -> None:
    config = make_config(
        model={"own_item_bias": own, "item_bias": "learned"},
        train={"validation_users": 1000},
        loss={"request_time": "target"},
        evaluate={"exclude_seen": exclude_seen},
    )
    torch.manual_seed(0)
    network = Network(config.model, feature_schema(dataset, config)).eval()
    if network.own_items is not None:
        network.own_items.out.weight.normal_()
    histories = dataset.histories
    start, end = validation_span(dataset, config.data.split)
    figures = []
    for user in np.flatnonzero(end > start):
        cut, rows = int(start[user]), histories.rows(int(user))
        items, times = histories.item_index[rows], histories.timestamp[rows]
        targets = {int(i) for i, t in zip(items[cut : end[user]], times[cut : end[user]]) if t == times[cut]}
        batch = questions_batch(
            histories,
            np.array([user]),
            np.array([0]),
            np.array([cut]),
            np.array([times[cut]]),
            chunk_size=config.model.chunk_size,
            max_length=config.data.max_length,
        )
        scores = (network(batch)[0] @ network.item_vectors().T).tolist()
        scores[0] = -math.inf
        for item in {int(item) for item in items[:cut]}:
            met = times[:cut][items[:cut] == item]
            if network.own_items is not None:
                now = max(int(times[cut]), int(times[cut - 1]))
                values = (torch.tensor([value]) for value in (float(len(met)), int(met[0]), int(met[-1]), now))
                scores[item] += float(network.own_bias(torch.tensor([item]), *values))
            if exclude_seen and item not in targets:
                scores[item] = -math.inf
        figures.append(plain_ndcg(scores, targets, 10))
    found = Validation(dataset, config).ndcg(network, torch.device("cpu"), "auto", False)
    assert found == pytest.approx(float(np.mean(figures)), abs=1e-3)
