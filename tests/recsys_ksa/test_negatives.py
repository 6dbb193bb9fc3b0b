"""Negatives come as often as their stated probability says, and again for the same step."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recsys_ksa.data.negatives import NegativeSampler, training_counts
from recsys_ksa.errors import DataError

COUNTS = np.array([99, 1, 16, 0, 81])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_draws_follow_their_log_probability(power: float) -> None:
    sampler = NegativeSampler(COUNTS, power, seed=0)
    probability = sampler.log_probability.exp()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-6)
    weight = np.array([1.0, 16.0, 1.0, 81.0]) ** power
    assert probability[1:].tolist() == pytest.approx((weight / weight.sum()).tolist(), rel=1e-5)
    share = torch.bincount(sampler.draw(200_000, step=1), minlength=5) / 200_000
    assert (share - probability).abs().max() < 0.01


def test_the_unknown_item_is_never_drawn() -> None:
    sampler = NegativeSampler(COUNTS, 0.5, seed=0)
    assert sampler.draw(10_000, step=0).min() == 1
    assert sampler.log_probability[0] == -torch.inf


def test_a_step_draws_the_same_whenever_it_is_asked() -> None:
    sampler = NegativeSampler(COUNTS, 0.5, seed=4)
    sampler.draw(7, step=0)
    assert torch.equal(sampler.draw(50, step=3), NegativeSampler(COUNTS, 0.5, seed=4).draw(50, step=3))
    assert not torch.equal(sampler.draw(50, step=3), sampler.draw(50, step=4))


def test_counts_end_with_the_training_span() -> None:
    histories = SimpleNamespace(offsets=np.array([0, 3, 3, 7]), item_index=np.array([1, 2, 2, 1, 1, 3, 3]))
    assert training_counts(histories, np.array([2, 0, 3]), 5).tolist() == [0, 3, 1, 1, 0]  # pyright: ignore


def test_a_vocabulary_without_items_is_refused() -> None:
    with pytest.raises(DataError, match="expected at least one item"):
        NegativeSampler(np.array([0]), 0.5, seed=0)
