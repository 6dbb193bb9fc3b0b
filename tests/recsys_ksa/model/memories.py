"""What tests of memories share: small networks, random histories, and how close rows are."""

import numpy as np
import torch

from recsys_ksa.config import ModelConfig
from recsys_ksa.model.append import Arrivals
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.network import Network
from recsys_ksa.model.state import UserMemory

NUM_ITEMS = 40
EXACT = 1e-10
"""Row-norm relative bound in float64."""


def small_config(**changes: object) -> ModelConfig:
    base = {"dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "feed_forward_dim": 24, "dropout": 0.0}
    return ModelConfig.model_validate(base | changes)


def build(config: ModelConfig, seed: int) -> Network:
    torch.manual_seed(seed)
    network = Network(config, FeatureSchema(NUM_ITEMS, 3)).double().eval()
    if network.item_bias is not None:
        torch.nn.init.normal_(network.item_bias)
    return network


def draw_history(rng: np.random.Generator, length: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(rng.integers(0, high, length)) for high in (NUM_ITEMS, 3, 40))


def arrive(*parts: tuple[torch.Tensor, ...]) -> Arrivals:
    return Arrivals([len(part[0]) for part in parts], *(torch.cat(column) for column in zip(*parts)))


def all_rows(memory: UserMemory) -> torch.Tensor:
    """Everything the network keeps, one row a token."""
    rows = [part.whole().flatten(1) for layer in memory.layers for part in (layer.events, layer.summaries)]
    return torch.cat(rows)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max())
