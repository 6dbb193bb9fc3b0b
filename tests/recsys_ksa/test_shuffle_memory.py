"""Shuffled in pools, an epoch reads a mapped file a few times at most, and no more of it at a time than two pools."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from recsys_ksa.config import RunConfig
from recsys_ksa.data.epoch_plan import POOL_BLOCKS
from recsys_ksa.data.jagged_arrays import offsets_of
from recsys_ksa.data.training_batches import TrainingBatches

PAGE = 512
"""Events of a page of 4,096 bytes, 8 bytes each."""
POOL = 20_000


class Mapped:
    """A mapped column: tells which of its pages were read."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.pages: set[int] = set()

    def __getitem__(self, rows: Any) -> np.ndarray:
        self.pages.update(np.unique(np.arange(len(self._values))[rows] // PAGE).tolist())
        return self._values[rows]


def test_what_is_read_at_a_time_is_a_pool_however_large_the_file(rng: np.random.Generator) -> None:
    read: dict[int, tuple[Any, float]] = {}
    for users in (6_000, 24_000):
        lengths = rng.integers(1, 60, users)
        events = int(lengths.sum())
        timestamp = Mapped(np.sort(rng.integers(0, 2**31, events)))
        histories: Any = SimpleNamespace(
            offsets=offsets_of(lengths),
            item_index=rng.integers(1, 50, events).astype(np.int32),
            timestamp=timestamp,
            event_type=None,
            value=None,
            users=None,
        )
        config = RunConfig.model_validate(
            {"model": {"chunk_size": 4}, "data": {"shuffle_events": POOL}, "train": {"batch_tokens": 4_000}}
        )
        batches = TrainingBatches(histories, lengths, config)
        pools: list[int] = []
        seen = in_pool = 0
        for position in range(batches.num_batches(0)):
            batch = batches.batch(0, position)
            seen, in_pool = seen + batch.num_events, in_pool + batch.num_events
            if in_pool >= POOL or position + 1 == batches.num_batches(0):
                pools.append(len(timestamp.pages))
                timestamp.pages.clear()
                in_pool = 0
        assert seen == events
        # A window of a pool's size lies in two pools at most; each block of neighbours begins and ends inside a page.
        assert max(pools) <= 2 * (1.25 * POOL / PAGE + 2 * POOL_BLOCKS)
        read[users] = np.mean(pools), sum(pools) / (events / PAGE)
    # A file four times as large; the most of more pools is more, by chance.
    assert read[24_000][0] < 1.25 * read[6_000][0]
    assert max(times for _, times in read.values()) < 4
