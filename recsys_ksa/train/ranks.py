"""Processes that train one network together: batches of its own each, the same weights in all.

torchrun starts them. A step's gradient is that of the union of their batches: each loss is a mean over its questions,
so it counts by their share, and `DistributedDataParallel` adds the gradients up while they are computed. Files are
written by the first process; what depends on the clock or on validation is as the first one sees it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is; alone by default."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes, validates and reports."""
        return self.rank == 0

    def first(self, value: float) -> float:
        """Return the first process' value."""
        if self.world_size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(held, 0)
        return held.item()

    def total(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes."""
        if self.world_size == 1:
            return list(values)
        held = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(held)
        return held.tolist()

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return the module so that backward passes leave the mean of all processes' gradients in its parameters.

        It begins with the first process' weights in all of them. Parameters that no process' pass used get none.
        """
        if self.world_size == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Yield this process' place among those that torchrun started together; alone without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    # Numbers of the host, such as counts and the clock, go by gloo: they do not wait for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
