"""Where the work on files and buckets runs: in this process, or as tasks on a Ray cluster."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs one function on many tasks."""

    workers: int
    """Tasks that run at a time and share the memory."""
    processes: int
    """Processes they run in."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield each task's result, in order of tasks."""
        ...


class LocalEngine:
    """Threads of this process: Polars, Arrow and numpy work outside Python's lock.

    Args:
        workers: tasks at a time; unset: one a core.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.processes = 1

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield each task's result, in order of tasks; the first error stops the rest."""
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                yield from pool.map(function, tasks)
            finally:
                pool.shutdown(cancel_futures=True)
