"""Losses: how far a question's answer is from its targets. All in float32, whatever the network computes in.

Letters: Q questions, M targets (question, item, weight), N negatives, I items, E width of user and item vectors,
O owned items, P pairs (question, owned item of its user). score = user vector . item vector (the user vector
already holds 1 / temperature). Row 0, the unknown item, is never a candidate.

With a popularity bias every score but an owned item's gains what the item's popularity is worth on the question's day.

Softmax losses are the mean over questions of `sum over targets of weight * (log Z - score of the target)`.

- sampled softmax: Z sums exactly over the items the user owned at that question (with the own-item bias) and over
  the targets; the rest of the items is estimated from negatives drawn with probability q, each weighing
  1 / (N q), that is `score - log(N q)`. Negatives that the question owns or asks for are left out, so nothing
  counts twice.
- full softmax: Z sums over every item. Scores are recomputed in the backward pass, a block at a time: no [Q, I]
  tensor exists.
- gBCE (gSASRec, arXiv 2308.07192): binary cross entropy whose positive part is raised to the power beta; its
  negatives are uniform, which beta assumes.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ksa_kernels.catalogue_softmax import catalogue_log_z
from recsys_ksa.config import LossConfig, ModelConfig
from recsys_ksa.data.batches import Batch
from recsys_ksa.data.own_items import OwnItems
from recsys_ksa.errors import ConfigError
from recsys_ksa.model.popularity import Popularity, PopularityBias, day_of
from recsys_ksa.schema import UNKNOWN_ITEM

NOTHING = -1e30
"""Log of no weight. Finite: a row without candidates has gradients of 0, not NaN."""


class ItemScorer(Protocol):
    """What a loss needs of the network."""

    @property
    def popularity_bias(self) -> PopularityBias | None:
        """Gives what an item's score gains by its popularity."""
        ...

    def item_vectors(self, item_index: Tensor | None = None) -> Tensor:
        """Return item vectors [C, E]; None: of every item."""
        ...

    def own_bias(self, item_index: Tensor, count: Tensor, first: Tensor, last: Tensor, now: Tensor) -> Tensor:
        """Return what the scores of owned items gain, one each pair."""
        ...


def check_loss(loss: LossConfig, model: ModelConfig) -> None:
    """Refuse losses that the model's head cannot be trained with.

    Raises:
        ConfigError: own-item bias with another loss than sampled softmax, which alone scores owned items exactly.
    """
    if model.own_item_bias and loss.kind != "sampled-softmax":
        raise ConfigError(
            f"loss.kind: expected sampled-softmax with model.own_item_bias, got {loss.kind}. "
            "Change one of them: only sampled softmax scores each user's own items."
        )


def batch_loss(
    network: ItemScorer,
    users: Tensor,
    batch: Batch,
    loss: LossConfig,
    negatives: Tensor,
    log_probability: Tensor,
    popularity: Popularity | None = None,
) -> Tensor:
    """Return the loss of a batch, a float32 scalar: the mean over its questions.

    Args:
        network: gives item vectors and the own-item bias.
        users: user vectors of the batch's questions, [Q, E].
        batch: with at least one question.
        loss: which loss, and gBCE's calibration.
        negatives: item indices, int64 [N]; full softmax looks at none.
        log_probability: log of each item's probability of being drawn, float32 [I].
        popularity: counts of the training span, for a network with a popularity bias.
    """
    with torch.autocast(users.device.type, enabled=False):
        users = users if users.dtype == torch.float64 else users.float()
        if loss.kind == "full-softmax":
            return full_softmax(network, users, batch, popularity)
        if loss.kind == "gbce":
            num_items = log_probability.shape[0] - 1
            return gbce(network, users, batch, negatives, num_items, loss.gbce_calibration, popularity)
        return sampled_softmax(network, users, batch, negatives, log_probability, popularity)


def sampled_softmax(
    network: ItemScorer,
    users: Tensor,
    batch: Batch,
    negatives: Tensor,
    log_probability: Tensor,
    popularity: Popularity | None = None,
) -> Tensor:
    """Return sampled softmax with logQ correction, owned items exact; see the module's head."""
    question, item = batch.target_question, batch.target_item
    scores = (users[question] * network.item_vectors(item)).sum(-1)
    gain = _target_popularity(network, batch, popularity)
    outside = torch.ones_like(question, dtype=torch.bool)  # targets that are not among the owned candidates

    negatives, _ = negatives.sort()
    drawn = users @ network.item_vectors(negatives).T + _popularity_of(network, batch, popularity, negatives)
    drawn = drawn - (log_probability[negatives] + math.log(len(negatives)))
    excluded = torch.zeros(drawn.shape, dtype=torch.bool, device=drawn.device)
    excluded[_hits(question, item, negatives)] = True

    log_z = torch.full_like(drawn[:, 0], NOTHING)
    if batch.own is not None and len(batch.own.item):
        own_log_z, bias = _owned(network, users, batch, batch.own)
        owned = batch.own.target_pair >= 0
        gain = torch.where(owned, bias[batch.own.target_pair.clamp(min=0)], gain)
        outside = ~owned
        log_z = own_log_z
        excluded[_owned_hits(batch, batch.own, negatives)] = True

    scores = scores + gain
    log_z = torch.logaddexp(log_z, drawn.masked_fill(excluded, NOTHING).logsumexp(-1))
    log_z = torch.logaddexp(log_z, _grouped_logsumexp(scores[outside], question[outside], len(users)))
    return (batch.target_weight * (log_z[question] - scores)).sum() / len(users)


def full_softmax(network: ItemScorer, users: Tensor, batch: Batch, popularity: Popularity | None = None) -> Tensor:
    """Return softmax over all items. With a popularity bias questions go by day, and a day's biases are one row."""
    question, item = batch.target_question, batch.target_item
    items = network.item_vectors().to(users.dtype)
    scores = (users[question] * items[item]).sum(-1) + _target_popularity(network, batch, popularity)
    rows = items[UNKNOWN_ITEM + 1 :]
    bias, counts = network.popularity_bias, popularity
    if bias is None:
        log_z = catalogue_log_z(users, rows)
    else:
        assert counts is not None
        assert batch.target_time is not None

        def log_z_of_day(users: Tensor, rows: Tensor, day: Tensor) -> Tensor:
            return catalogue_log_z(users, rows, bias(counts.log_shares(day))[UNKNOWN_ITEM + 1 :].to(users.dtype))

        days, place = day_of(batch.target_time).unique(return_inverse=True)
        order = place.argsort(stable=True)
        groups = users[order].split(place.bincount(minlength=len(days)).tolist())
        # Computed again in the backward pass: a [days, items] tensor would be kept otherwise.
        parts = [checkpoint(log_z_of_day, group, rows, day, use_reentrant=False) for group, day in zip(groups, days)]
        log_z = torch.cat(parts)[order.argsort()]
    return (batch.target_weight * (log_z[question] - scores)).sum() / len(users)


def gbce(
    network: ItemScorer,
    users: Tensor,
    batch: Batch,
    negatives: Tensor,
    num_items: int,
    calibration: float,
    popularity: Popularity | None = None,
) -> Tensor:
    """Return gBCE: -(beta log sigmoid(positive) + sum over negatives of log sigmoid(-negative)) / (N + 1).

    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha), alpha the sampling rate N / (I - 1), t the calibration:
    t = 1 gives calibrated probabilities, t = 0 plain binary cross entropy. arXiv 2308.07192.
    """
    question, item = batch.target_question, batch.target_item
    alpha = min(len(negatives) / max(num_items - 1, 1), 1.0)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    scores = (users[question] * network.item_vectors(item)).sum(-1)
    positive = F.logsigmoid(scores + _target_popularity(network, batch, popularity))
    negatives, _ = negatives.sort()
    scores = users @ network.item_vectors(negatives).T + _popularity_of(network, batch, popularity, negatives)
    drawn = F.logsigmoid(-scores)
    excluded = torch.zeros(drawn.shape, dtype=torch.bool, device=drawn.device)
    excluded[_hits(question, item, negatives)] = True
    total = beta * (batch.target_weight * positive).sum() + drawn.masked_fill(excluded, 0.0).sum()
    return -total / (len(negatives) + 1) / len(users)


def _target_popularity(network: ItemScorer, batch: Batch, popularity: Popularity | None) -> Tensor:
    """Return what each target's score gains by its popularity, [M]; [] without a popularity bias."""
    if network.popularity_bias is None:
        return torch.zeros((), device=batch.target_item.device)
    assert popularity is not None
    assert batch.target_time is not None
    day = day_of(batch.target_time)[batch.target_question]
    return network.popularity_bias(popularity.log_shares(day, batch.target_item))


def _popularity_of(network: ItemScorer, batch: Batch, popularity: Popularity | None, item_index: Tensor) -> Tensor:
    """Return what scores of given items gain at each question, [Q, C]; [] without a popularity bias."""
    if network.popularity_bias is None:
        return torch.zeros((), device=item_index.device)
    assert popularity is not None
    assert batch.target_time is not None
    days, place = day_of(batch.target_time).unique(return_inverse=True)
    by_day = network.popularity_bias(popularity.log_shares(days[:, None], item_index))
    return by_day.index_select(0, place)


def own_bias(network: ItemScorer, batch: Batch, own: OwnItems) -> Tensor:
    """Return the own-item bias of each pair, [P]; of no meaning where the pair's count is 0."""
    now = batch.request_time[pair_questions(own)]
    return network.own_bias(pair_items(own), own.count, own.first, own.last, now)


def pair_questions(own: OwnItems) -> Tensor:
    """Return each pair's question, int64 [P]."""
    owned = own.item_offsets.diff()
    first = torch.repeat_interleave(own.question_offsets[:-1], owned, output_size=own.item_offsets_list[-1])
    return torch.arange(own.num_pairs, device=first.device) + own.spread(first - own.pair_offsets[:-1])


def pair_items(own: OwnItems) -> Tensor:
    """Return each pair's item, int64 [P]."""
    return own.spread(own.item)


def _owned(network: ItemScorer, users: Tensor, batch: Batch, own: OwnItems) -> tuple[Tensor, Tensor]:
    """Return log of the sum of exp(score + bias) over each question's owned items [Q], and the biases [P].

    One matrix product a user: pairs are never gathered as vectors.
    """
    bias = own_bias(network, batch, own)
    pairs = [owned * questions for owned, questions in own.shapes]
    log_z = []
    for (owned, questions), user_QE, item_OE, bias_P, count_P in zip(
        own.shapes,
        users.split([questions for _, questions in own.shapes]),
        network.item_vectors(own.item).split([owned for owned, _ in own.shapes]),
        bias.split(pairs),
        own.count.split(pairs),
    ):
        if owned == 0:
            log_z.append(users.new_full((questions,), NOTHING))
            continue
        shape = (owned, questions)
        scores = (item_OE @ user_QE.T + bias_P.view(shape)).masked_fill(count_P.view(shape) == 0, NOTHING)
        log_z.append(scores.logsumexp(0))
    return torch.cat(log_z), bias


def _grouped_logsumexp(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Return the log-sum-exp of each group's values, `NOTHING` of an empty one. [P], int64 [P] -> [num_groups]."""
    top = torch.full((num_groups,), NOTHING, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, group, values.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, group, (values - top[group]).exp())
    return top + total.clamp(min=torch.finfo(values.dtype).tiny).log()


def _hits(question: Tensor, item: Tensor, sorted_negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Return (question, column) of every negative that is one of the question's targets."""
    first = torch.searchsorted(sorted_negatives, item)
    times = torch.searchsorted(sorted_negatives, item, right=True) - first
    return torch.repeat_interleave(question, times), _ragged_arange(first, times)


def _owned_hits(batch: Batch, own: OwnItems, sorted_negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Return (question, column) of every negative that the question's user owned by then."""
    owned = own.item_offsets.diff()
    questions = torch.bincount(batch.question_user, minlength=len(owned))
    first = torch.searchsorted(sorted_negatives, own.item)
    times = torch.searchsorted(sorted_negatives, own.item, right=True) - first
    slot = torch.repeat_interleave(times)
    column = _ragged_arange(first, times)
    user = torch.repeat_interleave(owned)[slot]

    # Each match concerns every question of its user that already owned the item.
    match = torch.repeat_interleave(questions[user])
    user, slot, column = user[match], slot[match], column[match]
    starts = questions.cumsum(0) - questions
    nth = torch.arange(len(match), device=match.device)
    nth -= torch.searchsorted(match, match)  # place among the match's rows
    pair = own.pair_offsets[slot] + nth
    kept = own.count[pair] > 0
    return (starts[user] + nth)[kept], column[kept]


def _ragged_arange(starts: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
    """Return starts[u], starts[u] + 1, ... (lengths[u] of them) for each u; `total` spares a transfer."""
    shift = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths, output_size=total)
    return torch.arange(len(shift), device=starts.device) + shift
