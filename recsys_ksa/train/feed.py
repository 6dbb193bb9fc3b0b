"""Feeds training: batches and their negatives, built ahead beside the network's work, on a thread or in processes.

What is yielded is a function of the step and its place in the epoch alone: not of how far ahead the builders have come,
nor of how many there are.
"""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection
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
        builders = [Builder(source) for _ in range(processes)]
        for builder in builders:
            running.callback(builder.stop)
        for _ in range(BUILT_AHEAD):
            for builder in builders:
                builder.ask(next(places))
        turns = cycle(builders)

        def ready() -> Feed:
            if builders:
                builder = next(turns)
                built = changed(builder.take(), np.ndarray, torch.from_numpy)
                builder.ask(next(places))
            else:
                built = source.build(next(places))
            return built.pin() if device.type == "cuda" else built

        ahead = thread.submit(ready)
        while True:
            try:
                given = ahead.result()
            except (EOFError, ConnectionError) as error:
                raise RunError(
                    f"train.loader_processes: expected {processes} to build batches, one ended: "
                    f"{', '.join(builder.end() for builder in builders if builder.has_ended())}. "
                    "Is there memory enough? Use fewer, or 0 for a thread."
                ) from error
            ahead = thread.submit(ready)
            yield given


class Builder:
    """A process that builds inputs, in the order they are asked for.

    Its end of the pipe is its own: when it dies, even half way through an answer, reading ends with an error. (The
    standard library's pool keeps that end open in this process, too, and would wait for the other half for ever.)
    """

    def __init__(self, source: Source) -> None:
        """Start the process, with `source` sent once. Spawned: a fork would copy what torch's threads are doing."""
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, source), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, place: Place) -> None:
        """Ask for the input of a place.

        Raises:
            ConnectionError: the process has ended.
        """
        self._connection.send(place)

    def take(self) -> Feed:
        """Wait for the next input, arrays in place of tensors.

        Raises:
            EOFError: the process has ended.
        """
        try:
            answer = self._connection.recv()
        except OSError as error:  # an answer that breaks off is no EOFError
            raise EOFError from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def has_ended(self) -> bool:
        """Whether the process is gone, or going: its end of the pipe is closed."""
        self._process.join(timeout=1.0)
        return self._process.exitcode is not None

    def end(self) -> str:
        """Return how the process ended."""
        return f"exit code {self._process.exitcode}"

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection, source: Source) -> None:
    """Answer until training has ended, however it did: the pipe is closed then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for training to stop
    try:
        while True:
            place = connection.recv()
            try:
                # Arrays: each tensor would be sent by a connection of its own.
                answer = changed(source.build(place), Tensor, Tensor.numpy)
            except Exception as error:
                answer = error
            connection.send(answer)
    except (EOFError, ConnectionError):
        return
