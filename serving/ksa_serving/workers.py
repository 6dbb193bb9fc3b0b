"""Where work is done so that the event loop stays free: threads by how long the work takes, and background tasks.

Quick work has threads of its own, so that it never waits behind a rebuild. Threads whose work no request waits for have
a lower priority: where cores are short, they wait.
"""

import asyncio
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

BACKGROUND_NICENESS = 10
"""Added to that of the process in threads that nobody waits for: about a tenth of the weight of the others."""


class DrainingError(Exception):
    """Work in the background is given up: the service ends."""


class Workers:
    """One service's threads and tasks. Its methods run on one event loop.

    draining: no background work is begun any more. closing: what waits in the background should not wait longer.
    """

    def __init__(self, model_threads: int):
        self.threads = ThreadPoolExecutor(model_threads, thread_name_prefix="model")
        self.draining = False
        self.closing = asyncio.Event()
        self._alone = ThreadPoolExecutor(1, thread_name_prefix="alone")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="slow", initializer=_give_way)
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="aside", initializer=_give_way)
        self._tasks: set[asyncio.Task[None]] = set()
        self._done: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._woken: asyncio.AbstractEventLoop | None = None

    async def wait_for(self, future: "Future[T]") -> T:
        """Return another thread's result; results that come together wake the event loop once."""
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[T] = loop.create_future()
        future.add_done_callback(partial(self._tell, loop, mine))
        try:
            return await mine
        except asyncio.CancelledError:
            future.cancel()
            raise

    def _tell(self, loop: asyncio.AbstractEventLoop, mine: "asyncio.Future[T]", done: "Future[T]") -> None:
        """Hand a result over, in the thread that has it."""
        if loop.is_closed():
            return
        self._done.append((mine, done))
        if self._woken is not loop:
            self._woken = loop
            loop.call_soon_threadsafe(self._take_over)

    def _take_over(self) -> None:
        self._woken = None  # before looking: what comes from here on wakes the loop again
        while self._done:
            mine, done = self._done.popleft()
            if mine.done():
                continue
            try:  # each thing asked of `done` takes its lock
                result = done.result()
            except CancelledError:
                mine.cancel()
            except BaseException as error:
                mine.set_exception(error)
            else:
                mine.set_result(result)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns, called in one of the model's threads."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: function(*args, **kwargs))

    async def run_alone(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns, called in the thread for what a request waits for and takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._alone, lambda: function(*args, **kwargs))

    async def run_slowly(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns, called in the thread for what takes long and nobody waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, lambda: function(*args, **kwargs))

    async def run_aside(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns, called in the thread for what takes minutes; nothing else waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, lambda: function(*args, **kwargs))

    def resting(self, share: float) -> Callable[[float], None]:
        """Return what a thread calls after each step of work, with the seconds it took: it takes `share` of the time.

        What it returns raises `DrainingError` once nothing should be begun any more.
        """

        def rest(seconds: float) -> None:
            if self.draining:
                raise DrainingError
            time.sleep(seconds * (1 / share - 1))

        return rest

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
        for threads in (self.threads, self._alone, self._slow, self._aside):
            threads.shutdown()


def _give_way() -> None:
    """Lower the priority of this thread: on Linux, for elsewhere it would be the whole process's."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + BACKGROUND_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))
