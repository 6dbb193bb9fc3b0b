"""Runs of one config that differ in their seed alone: how far a figure moves by chance of training."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recsys_ksa.config import RunConfig, dump_config
from recsys_ksa.evaluate.rows import Row

if TYPE_CHECKING:
    from recsys_ksa.evaluate.record import RunRecord


@dataclass(frozen=True)
class Spread:
    """A figure over runs that differ in their seed alone."""

    mean: float
    low: float
    """The lowest run's; no confidence interval."""
    high: float


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one config."""

    name: str
    """Of the first run."""
    seeds: tuple[int, ...]
    spreads: dict[str, Spread]
    """By slice."""


def recipe_hash(config: RunConfig) -> str:
    """Return a hash of the config without its seed and name: equal for runs that were made alike."""
    text = dump_config(config.model_copy(update={"seed": 0, "name": ""}))
    return hashlib.sha256(text.encode()).hexdigest()


def group_by_seed(runs: Mapping[str, "RunRecord"], rows: Sequence[Row]) -> list[SeedGroup]:
    """Return a group for each config that two seeds or more were trained with, in the order of the runs.

    Args:
        runs: by label.
        rows: of one metric and one request time; those of other models are passed over.
    """
    alike: dict[str, list[str]] = {}
    for label, run in runs.items():
        alike.setdefault(run.recipe_hash, []).append(label)
    groups = []
    for labels in alike.values():
        seeds = tuple(runs[label].seed for label in labels)
        if len(set(seeds)) < 2:
            continue
        values: dict[str, list[float]] = {}
        for row in rows:
            if row.model in labels:
                values.setdefault(row.slice, []).append(row.value)
        spreads = {part: Spread(float(np.mean(found)), min(found), max(found)) for part, found in values.items()}
        groups.append(SeedGroup(runs[labels[0]].name, seeds, spreads))
    return groups
