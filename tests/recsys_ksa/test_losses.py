"""Losses equal their plain definitions, in float64, values and gradients."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksa_kernels.catalogue_softmax import catalogue_log_z, torch_blocked
from recsys_ksa.config import LossConfig, ModelConfig, RunConfig
from recsys_ksa.data.batches import Batch
from recsys_ksa.data.jagged_arrays import offsets_of
from recsys_ksa.data.popularity import DAY, DayCounts
from recsys_ksa.data.training_batches import TrainingBatches
from recsys_ksa.errors import ConfigError
from recsys_ksa.model.losses import batch_loss, check_loss, own_bias, pair_items, pair_questions
from recsys_ksa.model.popularity import Popularity, PopularityBias, day_of

NUM_ITEMS, WIDTH = 12, 5
LENGTHS = [9, 1, 14, 6]


class Scorer(nn.Module):
    """The part of a network that losses use."""

    def __init__(self, own: bool, popular: bool = False) -> None:
        super().__init__()
        self.popularity_bias = PopularityBias(NUM_ITEMS).double() if popular else None
        self.table = nn.Parameter(torch.randn(NUM_ITEMS, WIDTH, dtype=torch.float64))
        self.slope = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.own = own

    def item_vectors(self, item_index: Tensor | None = None) -> Tensor:
        return self.table if item_index is None else self.table[item_index]

    def own_bias(self, item_index: Tensor, count: Tensor, first: Tensor, last: Tensor, now: Tensor) -> Tensor:
        assert self.own
        rhythm = (0.04 * (last - first).double() - 0.02 * (now - last).double()) / DAY
        return 0.1 * self.table[item_index, 0] + self.slope * count.double().log1p() + rhythm


def make_batch(
    rng: np.random.Generator, own: bool, targets: str = "next-set", histories: SimpleNamespace | None = None
) -> Batch:
    histories = make_histories(rng) if histories is None else histories
    config = RunConfig.model_validate(
        {
            "model": {"chunk_size": 4, "own_item_bias": own},
            "loss": {"targets": targets, "request_time": "drawn"},
            "train": {"batch_tokens": 100},
        }
    )
    return TrainingBatches(histories, np.array(LENGTHS), config).batch(0, 0)  # pyright: ignore


def make_histories(rng: np.random.Generator) -> SimpleNamespace:
    total = sum(LENGTHS)
    return SimpleNamespace(
        offsets=offsets_of(np.array(LENGTHS)),
        lengths=np.array(LENGTHS),
        num_users=len(LENGTHS),
        num_events=total,
        item_index=rng.integers(0, NUM_ITEMS, total).astype(np.int32),
        # Half a day apart: several timestamps a day, several days.
        timestamp=np.concatenate([np.sort(rng.integers(0, n, n)) for n in LENGTHS]) * DAY // 2,
        event_type=None,
    )


def plain_sampled_softmax(
    scorer: Scorer,
    users: Tensor,
    batch: Batch,
    negatives: Tensor,
    log_probability: Tensor,
    gain: Tensor | None = None,
) -> Tensor:
    gain = users.new_zeros(len(users), NUM_ITEMS) if gain is None else gain
    total = users.new_zeros(())
    owned: list[dict[int, Tensor]] = [{} for _ in range(len(users))]
    if batch.own is not None:
        bias = own_bias(scorer, batch, batch.own)
        pairs = zip(pair_questions(batch.own).tolist(), pair_items(batch.own).tolist())
        for pair, (question, item) in enumerate(pairs):
            if batch.own.count[pair] > 0:
                owned[question][item] = bias[pair]
    for q, user in enumerate(users):
        mine = batch.target_question == q
        targets = batch.target_item[mine].tolist()
        exact = {item: gain[q, item] for item in targets} | owned[q]
        logits = [user @ scorer.table[item] + bias for item, bias in exact.items()]
        logits += [
            user @ scorer.table[item] + gain[q, item] - log_probability[item] - math.log(len(negatives))
            for item in negatives.tolist()
            if item not in exact
        ]
        if not logits:
            continue
        log_z = torch.stack(logits).logsumexp(0)
        for item, weight in zip(targets, batch.target_weight[mine]):
            total = total + weight * (log_z - user @ scorer.table[item] - exact[item])
    return total / len(users)


def gradients(loss: Tensor, scorer: Scorer, users: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, [scorer.table, scorer.slope, users], allow_unused=True, retain_graph=True)
    return [torch.zeros(()) if grad is None else grad for grad in found]


def assert_same(one: Tensor, two: Tensor, scorer: Scorer, users: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(one, scorer, users), gradients(two, scorer, users)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, check_dtype=False)


def user_vectors(batch: Batch) -> Tensor:
    return torch.randn(batch.num_questions, WIDTH, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("targets", ["next-event", "next-set"])
def test_sampled_softmax_is_its_definition(own: bool, targets: str, rng: np.random.Generator) -> None:
    scorer, batch = Scorer(own), make_batch(rng, own, targets)
    users = user_vectors(batch)
    log_probability = torch.randn(NUM_ITEMS, dtype=torch.float64).log_softmax(0)
    negatives = torch.from_numpy(rng.integers(1, NUM_ITEMS, 20))
    loss = batch_loss(scorer, users, batch, LossConfig(), negatives, log_probability)
    assert_same(loss, plain_sampled_softmax(scorer, users, batch, negatives, log_probability), scorer, users)


def test_sampled_softmax_of_every_item_once_is_full_softmax(rng: np.random.Generator) -> None:
    scorer, batch = Scorer(False), make_batch(rng, False)
    users = user_vectors(batch)
    every = torch.arange(1, NUM_ITEMS)
    uniform = torch.full((NUM_ITEMS,), -math.log(len(every)), dtype=torch.float64)
    sampled = batch_loss(scorer, users, batch, LossConfig(), every, uniform)
    full = batch_loss(scorer, users, batch, LossConfig(kind="full-softmax"), every, uniform)
    assert_same(sampled, full, scorer, users)


def test_full_softmax_is_cross_entropy(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_blocked, "USERS_AT_ONCE", 4)
    monkeypatch.setattr(torch_blocked, "ITEMS_AT_ONCE", 5)
    scorer, batch = Scorer(False), make_batch(rng, False)
    users = user_vectors(batch)
    loss = batch_loss(scorer, users, batch, LossConfig(kind="full-softmax"), torch.arange(1, 3), torch.zeros(NUM_ITEMS))
    logits = (users @ scorer.table[1:].T)[batch.target_question]
    each = F.cross_entropy(logits, batch.target_item - 1, reduction="none")
    assert_same(loss, (batch.target_weight * each).sum() / len(users), scorer, users)


def test_full_softmax_keeps_no_scores() -> None:
    users = torch.randn(64, WIDTH, requires_grad=True)
    items = torch.randn(500, WIDTH, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        catalogue_log_z(users, items).sum().backward()
    assert max(kept) <= items.numel()


@pytest.mark.parametrize("own", [False, True])
def test_sampled_softmax_with_popularity_is_its_definition(own: bool, rng: np.random.Generator) -> None:
    scorer, batch, popularity, gain = popular_case(rng, own)
    users = user_vectors(batch)
    log_probability = torch.randn(NUM_ITEMS, dtype=torch.float64).log_softmax(0)
    negatives = torch.from_numpy(rng.integers(1, NUM_ITEMS, 20))
    loss = batch_loss(scorer, users, batch, LossConfig(), negatives, log_probability, popularity)
    plain = plain_sampled_softmax(scorer, users, batch, negatives, log_probability, gain)
    assert_same(loss, plain, scorer, users)
    assert_same_weights(loss, plain, scorer)


def test_full_softmax_with_popularity_is_cross_entropy(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_blocked, "USERS_AT_ONCE", 4)
    monkeypatch.setattr(torch_blocked, "ITEMS_AT_ONCE", 5)
    scorer, batch, popularity, gain = popular_case(rng, False)
    users, config = user_vectors(batch), LossConfig(kind="full-softmax")
    loss = batch_loss(scorer, users, batch, config, torch.arange(1, 3), torch.zeros(NUM_ITEMS), popularity)
    logits = (users @ scorer.table.T + gain)[batch.target_question, 1:]
    each = F.cross_entropy(logits, batch.target_item - 1, reduction="none")
    plain = (batch.target_weight * each).sum() / len(users)
    assert_same(loss, plain, scorer, users)
    assert_same_weights(loss, plain, scorer)


def popular_case(rng: np.random.Generator, own: bool) -> tuple[Scorer, Batch, Popularity, Tensor]:
    """Return a scorer, a batch, its counts, and what each item gains at each question, [Q, I]."""
    histories = make_histories(rng)
    scorer, batch = Scorer(own, popular=True), make_batch(rng, own, histories=histories)
    assert scorer.popularity_bias is not None
    assert batch.target_time is not None
    torch.nn.init.normal_(scorer.popularity_bias.weight)
    popularity = Popularity(DayCounts.of_histories(histories), NUM_ITEMS)  # pyright: ignore[reportArgumentType]
    shares = [popularity.log_shares(day) for day in day_of(batch.target_time)]
    return scorer, batch, popularity, scorer.popularity_bias(torch.stack(shares))


def assert_same_weights(one: Tensor, two: Tensor, scorer: Scorer) -> None:
    assert scorer.popularity_bias is not None
    weights = list(scorer.popularity_bias.parameters())
    pair = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (one, two))
    for a, b in zip(*pair):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
def test_gbce_is_its_definition(calibration: float, rng: np.random.Generator) -> None:
    scorer, batch = Scorer(False), make_batch(rng, False, "next-event")
    users = user_vectors(batch)
    negatives = torch.from_numpy(rng.integers(1, NUM_ITEMS, 6))
    config = LossConfig(kind="gbce", gbce_calibration=calibration)
    loss = batch_loss(scorer, users, batch, config, negatives, torch.zeros(NUM_ITEMS))
    alpha = 6 / (NUM_ITEMS - 2)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    total = users.new_zeros(())
    for q, item in zip(batch.target_question.tolist(), batch.target_item.tolist()):
        total = total + beta * F.logsigmoid(users[q] @ scorer.table[item])
    for q, user in enumerate(users):
        targets = batch.target_item[batch.target_question == q].tolist()
        for item in negatives.tolist():
            if item not in targets:
                total = total + F.logsigmoid(-(user @ scorer.table[item]))
    assert_same(loss, -total / 7 / len(users), scorer, users)


def test_calibration_0_is_plain_binary_cross_entropy() -> None:
    # beta = alpha * (0 + 1 / alpha) = 1 whatever the sampling rate; calibration 1 gives beta = alpha.
    for num in (1, 5):
        alpha = num / 10
        assert alpha * (0 * (1 - 1 / alpha) + 1 / alpha) == pytest.approx(1.0)
        assert alpha * (1 * (1 - 1 / alpha) + 1 / alpha) == pytest.approx(alpha)


@pytest.mark.parametrize("kind", ["sampled-softmax", "full-softmax", "gbce"])
def test_the_unknown_item_is_never_a_candidate(kind: str, rng: np.random.Generator) -> None:
    own = kind == "sampled-softmax"
    scorer, batch = Scorer(own), make_batch(rng, own)
    users = user_vectors(batch)
    negatives = torch.from_numpy(rng.integers(1, NUM_ITEMS, 9))
    uniform = torch.full((NUM_ITEMS,), -math.log(NUM_ITEMS - 1.0), dtype=torch.float64)
    loss = batch_loss(scorer, users, batch, LossConfig.model_validate({"kind": kind}), negatives, uniform)
    loss.backward()
    assert scorer.table.grad is not None
    assert not scorer.table.grad[0].any()
    assert scorer.table.grad[1:].any()


def test_losses_without_any_owned_item_are_finite(rng: np.random.Generator) -> None:
    histories = make_histories(rng)
    histories.item_index = histories.item_index.clip(min=1)  # unknown items are no targets, and the first must have one
    scorer, batch = Scorer(True), make_batch(rng, True, histories=histories)
    assert batch.own is not None
    first = int((batch.question_row < 0).nonzero()[0])
    users = user_vectors(batch)
    loss = batch_loss(scorer, users, batch, LossConfig(), torch.arange(1, NUM_ITEMS), torch.zeros(NUM_ITEMS))
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert users.grad is not None
    assert bool(torch.isfinite(users.grad).all())
    assert users.grad[first].any()


def test_half_precision_user_vectors_are_scored_in_float32(rng: np.random.Generator) -> None:
    scorer, batch = Scorer(False).float(), make_batch(rng, False)
    users = user_vectors(batch).detach().bfloat16()
    every, uniform = torch.arange(1, NUM_ITEMS), torch.full((NUM_ITEMS,), -math.log(NUM_ITEMS - 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        for config in (LossConfig(), LossConfig(kind="full-softmax")):
            loss = batch_loss(scorer, users, batch, config, every, uniform)
            exact = batch_loss(scorer.double(), users.double(), batch, config, every, uniform.double())
            scorer.float()
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["full-softmax", "gbce"])
def test_own_item_bias_needs_sampled_softmax(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"loss\.kind: expected sampled-softmax .*, got {kind}"):
        check_loss(LossConfig.model_validate({"kind": kind}), ModelConfig(own_item_bias=True))
