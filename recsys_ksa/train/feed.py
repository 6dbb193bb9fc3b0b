"""Feeds training: the next batch and its negatives, built one ahead on a thread beside the network's work."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_ksa.data.batches import Batch
from recsys_ksa.data.negatives import NegativeSampler
from recsys_ksa.data.training_batches import TrainingBatches


@dataclass(frozen=True)
class Feed:
    """One step's input, and where the step after it begins."""

    batch: Batch
    negatives: Tensor
    next_epoch: int
    next_position: int


def feed(
    batches: TrainingBatches,
    sampler: NegativeSampler,
    num_negatives: int,
    step: int,
    epoch: int,
    position: int,
    device: torch.device,
) -> Iterator[Feed]:
    """Yield the input of steps `step`, `step` + 1, ... without end, from the given batch on.

    What is yielded depends on the arguments alone, not on how far ahead the thread has come.
    """
    with ThreadPoolExecutor(1, "feed") as thread:
        ahead = thread.submit(_build, batches, sampler, num_negatives, step, epoch, position, device)
        while True:
            given = ahead.result()
            step += 1
            ahead = thread.submit(
                _build, batches, sampler, num_negatives, step, given.next_epoch, given.next_position, device
            )
            yield given


def _build(
    batches: TrainingBatches,
    sampler: NegativeSampler,
    num_negatives: int,
    step: int,
    epoch: int,
    position: int,
    device: torch.device,
) -> Feed:
    batch, negatives = batches.batch(epoch, position), sampler.draw(num_negatives, step)
    if device.type == "cuda":
        batch, negatives = batch.pin(), negatives.pin_memory()
    last = position + 1 == batches.num_batches(epoch)
    return Feed(batch, negatives, epoch + last, 0 if last else position + 1)
