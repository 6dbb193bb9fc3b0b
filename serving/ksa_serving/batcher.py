"""Questions that wait while the model works are answered together, in one pass.

A question that finds the model idle is answered at once: no time is spent waiting for company. Those that come
meanwhile make the next batch, so batches grow with the load by themselves. Questions whose deadline passed, or whose
asker has left, are dropped before any work.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from ksa_serving.errors import DeadlineError
from ksa_serving.models import Model, Question, Scored


@dataclass(frozen=True)
class _Waiting:
    question: Question
    deadline: float
    since: float
    answer: "asyncio.Future[Scored]"


class Batcher:
    """Asks one model, in a worker thread, one batch at a time. Its methods run on one event loop.

    Args:
        most: questions in one batch.
        on_batch: told each batch's size and how long its first question waited, in seconds.
    """

    def __init__(
        self,
        model: Model,
        threads: Executor,
        most: int,
        on_batch: Callable[[int, float], None] = lambda size, waited: None,
    ):
        self._model = model
        self._threads = threads
        self._most = most
        self._on_batch = on_batch
        self._waiting: deque[_Waiting] = deque()
        self._working: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Questions that wait."""
        return len(self._waiting)

    async def ask(self, question: Question, deadline: float) -> Scored:
        """Return the model's answer.

        Args:
            deadline: on `time.monotonic`'s clock; work begins before it or not at all.

        Raises:
            DeadlineError: it passed.
        """
        answer: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(question, deadline, time.monotonic(), answer))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._next_batch():
                self._on_batch(len(batch), time.monotonic() - batch[0].since)
                questions = [waiting.question for waiting in batch]
                try:
                    answers = await loop.run_in_executor(self._threads, self._model.recommend, questions)
                except Exception as error:
                    if len(batch) > 1:  # one question must not fail its neighbours
                        await self._one_by_one(batch)
                    elif not batch[0].answer.done():
                        batch[0].answer.set_exception(error)
                    continue
                for waiting, scored in zip(batch, answers):
                    if not waiting.answer.done():
                        waiting.answer.set_result(scored)
        finally:
            self._working = None

    async def _one_by_one(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        for waiting in batch:
            try:
                (scored,) = await loop.run_in_executor(self._threads, self._model.recommend, [waiting.question])
            except Exception as error:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            else:
                if not waiting.answer.done():
                    waiting.answer.set_result(scored)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
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
