"""Feeds training: batches and their negatives, built ahead beside the network's work, on a thread or in processes.

What is yielded is a function of the step and its place in the epoch alone: not of how far ahead the builders have come,
nor of how many there are.
"""

import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Self

import numpy as np
import torch
from torch import Tensor

from recsys_ksa.data.batches import Batch, changed
from recsys_ksa.data.negatives import NegativeSampler
from recsys_ksa.data.training_batches import TrainingBatches
from recsys_ksa.errors import RunError

BUILT_AHEAD = 2
"""Inputs each process keeps ready."""


@dataclass(frozen=True)
class Place:
    """Which input: of which step, and which batch of which epoch it reads."""

    step: int
    epoch: int
    position: int


@dataclass(frozen=True)
class Feed:
    """One step's input, and where the step after it begins."""

    batch: Batch
    negatives: Tensor
    next_epoch: int
    next_position: int

    def pin(self) -> Self:
        """Return a copy in page-locked memory."""
        return changed(self, Tensor, Tensor.pin_memory)


@dataclass(frozen=True)
class Source:
    """What inputs are built of. Another process gets it whole; of the histories only where they are mapped from."""

    batches: TrainingBatches
    sampler: NegativeSampler
    num_negatives: int

    def build(self, place: Place) -> Feed:
        """Return the input of a place, on the CPU."""
        batch = self.batches.batch(place.epoch, place.position)
        after = self.after(place)
        return Feed(batch, self.sampler.draw(self.num_negatives, place.step), after.epoch, after.position)

    def after(self, place: Place) -> Place:
        """Return the next step's place."""
        last = place.position + 1 == self.batches.num_batches(place.epoch)
        return Place(place.step + 1, place.epoch + last, 0 if last else place.position + 1)

    def places(self, first: Place) -> Iterator[Place]:
        """Yield places from the first on, without end."""
        while True:
            yield first
            first = self.after(first)


def feed(source: Source, first: Place, device: torch.device, processes: int = 0) -> Iterator[Feed]:
    """Yield the inputs of the steps from `first` on, without end.

    Args:
        source: what they are built of.
        first: where to begin.
        device: for CUDA they come in page-locked memory.
        processes: that build inputs; 0: a thread of this one does.

    Raises:
        RunError: a process ended.
    """
    places = source.places(first)
    with ExitStack() as running:
        thread = running.enter_context(ThreadPoolExecutor(1, "feed"))
        pool, coming = None, deque[Future[Feed]]()
        if processes:
            # Spawned: a fork would copy half of what CUDA's and torch's threads are doing.
            pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (source,))
            running.callback(pool.shutdown, cancel_futures=True)
            coming.extend(pool.submit(_build, next(places)) for _ in range(BUILT_AHEAD * processes))

        def ready() -> Feed:
            if pool is None:
                built = source.build(next(places))
            else:
                coming.append(pool.submit(_build, next(places)))
                built = changed(coming.popleft().result(), np.ndarray, torch.from_numpy)
            return built.pin() if device.type == "cuda" else built

        ahead = thread.submit(ready)
        while True:
            try:
                given = ahead.result()
            except BrokenProcessPool as error:
                raise RunError(
                    f"train.loader_processes: expected {processes} to build batches, one ended: {error} "
                    "Is there memory enough? Use fewer, or 0 for a thread."
                ) from error
            ahead = thread.submit(ready)
            yield given


_here: list[Source] = []
"""In a process that builds: what it builds from, sent once."""


def _begin(source: Source) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for training to stop
    Thread(target=_end_with_training, daemon=True).start()
    _here.append(source)


def _end_with_training() -> None:
    """End when the process that trains has ended, however it did: nobody else would tell."""
    training = parent_process()
    assert training is not None
    training.join()
    os._exit(1)


def _build(place: Place) -> Feed:
    """Return an input with arrays in place of tensors, each of which would be sent by a connection of its own."""
    return changed(_here[0].build(place), Tensor, Tensor.numpy)
