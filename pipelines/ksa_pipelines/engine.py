"""Where the work on files and buckets runs: in this process, or as tasks on a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs one function on many tasks."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield each task's result, in order of tasks."""
        ...


class LocalEngine:
    """One task after the other, in this process; Polars uses all cores within each."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield each task's result, in order of tasks."""
        return map(function, tasks)
