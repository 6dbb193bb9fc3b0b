"""Questions that wait while one thread works are answered together, in one pass.

A question that finds nobody at work is answered at once: no time is spent waiting for company. Those that come
meanwhile make the next batch, so batches grow with the load by themselves. Questions whose deadline passed, or whose
asker has left, are dropped before any work.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

from ksa_serving.errors import DeadlineError

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


@dataclass(frozen=True)
class _Waiting(Generic[Asked, Answered]):
    question: Asked
    deadline: float
    since: float
    answer: "asyncio.Future[Answered]"


class Batcher(Generic[Asked, Answered]):
    """Asks one function, in a worker thread, one batch at a time. Its methods run on one event loop.

    Args:
        answer_all: answers a batch, one answer a question, in order.
        most: questions in one batch.
        on_batch: told each batch's size and how long its first question waited, in seconds.
    """

    def __init__(
        self,
        answer_all: Callable[[Sequence[Asked]], Sequence[Answered]],
        threads: Executor,
        most: int,
        on_batch: Callable[[int, float], None] = lambda size, waited: None,
    ):
        self._answer_all = answer_all
        self._threads = threads
        self._most = most
        self._on_batch = on_batch
        self._waiting: deque[_Waiting[Asked, Answered]] = deque()
        self._working: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Questions that wait."""
        return len(self._waiting)

    async def ask(self, question: Asked, deadline: float) -> Answered:
        """Return the answer.

        Args:
            deadline: on `time.monotonic`'s clock; work begins before it or not at all.

        Raises:
            DeadlineError: it passed.
        """
        answer: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(question, deadline, time.monotonic(), answer))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._on_batch(len(batch), time.monotonic() - batch[0].since)
                if await self._answer(batch) and len(batch) > 1:
                    for waiting in batch:  # one question must not fail its neighbours
                        await self._answer([waiting])
        finally:
            self._working = None

    async def _answer(self, batch: list[_Waiting[Asked, Answered]]) -> bool:
        """Answer a batch; return whether it failed. A question alone is told why."""
        questions = [waiting.question for waiting in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._threads, self._answer_all, questions)
        except Exception as error:
            if len(batch) == 1 and not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return True
        for waiting, answered in zip(batch, answers):
            if not waiting.answer.done():
                waiting.answer.set_result(answered)
        return False

    def _next_batch(self) -> list[_Waiting[Asked, Answered]]:
        batch: list[_Waiting[Asked, Answered]] = []
        now = time.monotonic()
        while self._waiting and len(batch) < self._most:
            waiting = self._waiting.popleft()
            if waiting.answer.done():
                continue
            if waiting.deadline < now:
                waiting.answer.set_exception(DeadlineError("deadline: it passed while the request waited."))
            else:
                batch.append(waiting)
        return batch
