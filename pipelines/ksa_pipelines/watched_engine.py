"""An engine whose tasks show as a bar, where standard error is a terminal."""

from collections.abc import Callable, Iterator, Sequence

from ksa_pipelines.engine import Engine, Result, Task
from recsys_ksa.progress import progress


class WatchedEngine:
    """Another engine, with a bar for each of its passes, named as the function that runs on all tasks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.workers, self.processes = engine.workers, engine.processes

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield each task's result, in order of tasks."""
        name = getattr(getattr(function, "func", function), "__name__", "working")  # `func` of a partial
        yield from progress(self._engine.map(function, tasks), name.replace("_", " "), total=len(tasks), unit="task")
