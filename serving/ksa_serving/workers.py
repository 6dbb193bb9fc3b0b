"""Where work is done so that the event loop stays free: threads by how long the work takes, and background tasks.

Quick work has threads of its own, so that it never waits behind a rebuild.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """One service's threads and tasks. Its methods run on one event loop.

    draining: no background work is begun any more. closing: what waits in the background should not wait longer.
    """

    def __init__(self, model_threads: int):
        self.threads = ThreadPoolExecutor(model_threads, thread_name_prefix="model")
        self.draining = False
        self.closing = asyncio.Event()
        self._alone = ThreadPoolExecutor(1, thread_name_prefix="alone")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="slow")
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns, called in one of the model's threads."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: function(*args, **kwargs))

    async def run_alone(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns, called in the thread for what a request waits for and takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._alone, lambda: function(*args, **kwargs))

    async def run_slowly(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns, called in the thread for what takes long and nobody waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, lambda: function(*args, **kwargs))

    def begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start work in the background; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self) -> None:
        """Begin nothing more; return when what was begun has ended."""
        self.draining = True
        self.closing.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """End the threads."""
        for threads in (self.threads, self._alone, self._slow):
            threads.shutdown()
