"""How much of exact search an approximate index finds, and the gate that it must pass."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recsys_ksa.model.scoring import ScoringNetwork
from recsys_ksa.retrieval.index import Index
from recsys_ksa.schema import UNKNOWN_ITEM

MIN_RECALL = 0.98
"""At `DEPTH` items; an index below it is neither written nor served."""
DEPTH = 100
NUM_QUESTIONS = 1000
"""Asked when an index is built."""
NUM_PROBED = 200
"""Of them, asked again wherever it is loaded."""
ASKED_AT_ONCE = 16
SPREAD = 0.5
"""Length of the noise that takes a question away from an item, whose own is 1."""


def drawn_questions(network: ScoringNetwork, num: int = NUM_QUESTIONS, seed: int = 0) -> Tensor:
    """Return user vectors drawn around items, as the network gives them: float32 [num, E (+ 1)].

    The first questions are the same however many are drawn.
    """
    which, noise = (np.random.default_rng((seed, part)) for part in range(2))  # so that the first ones stay the same
    items = network.item_vectors().detach().to("cpu", torch.float32)
    dim = network.config.dim
    vectors = items[torch.from_numpy(which.integers(1, len(items), num))]
    away = noise.normal(0, SPREAD / dim**0.5, (num, dim)).astype(np.float32)
    vectors[:, :dim] = F.normalize(vectors[:, :dim] + torch.from_numpy(away), dim=1)
    vectors[:, :dim] /= float(network.temperature)
    vectors[:, dim:] = 1  # what an item's bias is multiplied with
    return vectors


def recall_of_each(index: Index, vectors: Tensor, questions: Tensor) -> NDArray[np.float64]:
    """Return the share of each question's `DEPTH` best items that the index finds, [Q].

    Args:
        index: searches `vectors`.
        vectors: float32 [I, E].
        questions: float32 [Q, E].
    """
    depth = min(DEPTH, len(vectors) - 1)
    shares: list[float] = []
    for some in questions.split(ASKED_AT_ONCE):
        scores = some @ vectors.T
        scores[:, UNKNOWN_ITEM] = -torch.inf
        for question, wanted in zip(some.numpy(), scores.topk(depth).indices.numpy()):
            found, _ = index.search(question, depth)
            shares.append(len(np.intersect1d(found, wanted)) / max(1, depth))
    return np.array(shares)
