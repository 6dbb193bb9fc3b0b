"""What decays, and how the learning rate runs."""

import itertools
from collections.abc import Callable

import pytest

from recsys_ksa.config import RunConfig, TrainConfig
from recsys_ksa.data.dataset import Dataset
from recsys_ksa.model.network import Network
from recsys_ksa.train.optim import learning_rate, make_optimizer
from recsys_ksa.train.run_files import feature_schema


def test_only_matrices_of_linear_layers_decay_and_scalars_run_ahead(
    dataset: Dataset, make_config: Callable[..., RunConfig]
) -> None:
    config = make_config(model={"item_bias": "learned"})
    network = Network(config.model, feature_schema(dataset, config))
    optimizer = make_optimizer(network, config.train)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    scale = {id(parameter): group["scale"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(decay) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        is_table = name.startswith(("embedding.", "request.", "summary_input", "own_items."))
        ahead = 10.0 if parameter.dim() == 0 else 5.0 if name.startswith("own_items.") else 1.0
        assert scale[id(parameter)] == ahead, name
        assert (decay[id(parameter)] > 0) == (parameter.dim() == 2 and not is_table), name


def test_the_learning_rate_warms_up_then_falls_to_its_end() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=10, max_steps=100, final_learning_rate=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(max(rates[9:12]))
    assert all(one >= two for one, two in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(config, 500) == pytest.approx(0.1)


def test_without_warmup_training_begins_at_the_peak() -> None:
    assert learning_rate(TrainConfig(learning_rate=0.5, warmup_steps=0), 0) == 0.5
