"""The optimiser and its schedule."""

import math

import torch
from torch import nn

from recsys_ksa.config import TrainConfig

SCALAR_RATE = 10.0
"""Learning rate of scalars (temperature, levels and slopes of the biases), as a multiple of the others'.

Adam moves a value by about the learning rate a step: in a short run a log temperature would not get far otherwise."""
OWN_ITEMS_RATE = 5.0
"""The same for the small network of the own-item bias, which starts at 0 and sees every pair of every batch."""


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices of linear layers only.

    Tables, norms, biases and other vectors do not decay: a rare item's row would shrink at every step that does not
    touch it, and scales have no reason to be 0. Each group's `scale` multiplies the learning rate.
    """
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    decayed, kept, scalars, own = [], [], [], []
    for name, parameter in network.named_parameters():
        if parameter.dim() == 0 or name.startswith("popularity_bias."):
            scalars.append(parameter)
        elif name.startswith("own_items."):
            own.append(parameter)
        elif parameter.dim() >= 2 and id(parameter) not in tables and not _is_table(name):
            decayed.append(parameter)
        else:
            kept.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "scale": 1.0},
        {"params": kept, "weight_decay": 0.0, "scale": 1.0},
        {"params": scalars, "weight_decay": 0.0, "scale": SCALAR_RATE},
        {"params": own, "weight_decay": 0.0, "scale": OWN_ITEMS_RATE},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, 0 for the first: linear warm-up, then a cosine down to `final_learning_rate`.

    It follows the steps alone, never the clock: what is trained does not depend on how fast the machine is.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(step / max(config.max_steps, 1), 1.0)))
    return config.learning_rate * warm * (config.final_learning_rate + (1.0 - config.final_learning_rate) * cosine)


def _is_table(name: str) -> bool:
    # An EmbeddingCollection may hold its tables as modules of another class (quantised, sharded).
    return "embeddings." in name or name == "summary_input"
