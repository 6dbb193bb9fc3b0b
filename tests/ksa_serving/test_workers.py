import asyncio
import os
import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from ksa_serving import workers as workers_module
from ksa_serving.workers import BACKGROUND_NICENESS, DrainingError, Workers


def test_results_that_come_together_wake_the_event_loop_once():
    async def story() -> None:
        workers, loop = Workers(1), asyncio.get_running_loop()
        futures: list[Future[int]] = [Future() for _ in range(50)]
        waits = [asyncio.ensure_future(workers.wait_for(future)) for future in futures]
        await asyncio.sleep(0)
        wakes: list[Any] = []
        wake, loop.call_soon_threadsafe = loop.call_soon_threadsafe, lambda *told, **_: wakes.append(told)  # type: ignore
        for n, future in enumerate(futures[:-1]):
            future.set_result(n)
        assert len(wakes) == 1
        loop.call_soon_threadsafe = wake  # type: ignore[method-assign]
        loop.call_soon(*wakes[0])
        assert await asyncio.gather(*waits[:-1]) == list(range(49))
        futures[-1].set_exception(ValueError("of its own"))  # what comes later wakes it again
        with pytest.raises(ValueError, match="of its own"):
            await waits[-1]
        workers.close()

    asyncio.run(story())


def test_results_of_other_threads_arrive_each_at_its_own_asker():
    async def story() -> None:
        workers = Workers(1)
        futures: list[Future[int]] = [Future() for _ in range(500)]

        def answer() -> None:
            for n, future in enumerate(futures):
                if future.set_running_or_notify_cancel():
                    future.set_result(n)
                if n % 100 == 0:
                    time.sleep(0.001)

        waits = [asyncio.ensure_future(workers.wait_for(future)) for future in futures]
        await asyncio.sleep(0)
        waits[7].cancel()
        await asyncio.sleep(0)
        assert futures[7].cancelled()
        thread = threading.Thread(target=answer)
        thread.start()
        results = await asyncio.gather(*waits, return_exceptions=True)
        thread.join()
        assert [n for n, result in enumerate(results) if result != n] == [7]
        workers.close()

    asyncio.run(story())


def test_an_error_and_a_cancelled_work_of_other_threads_arrive_as_that():
    async def story() -> None:
        workers = Workers(1)
        failed, cancelled = Future[int](), Future[int]()
        asked = [asyncio.create_task(workers.wait_for(future)) for future in (failed, cancelled)]
        await asyncio.sleep(0)
        failed.set_exception(ValueError("no"))
        cancelled.cancel()
        await asyncio.wait(asked, timeout=120)
        with pytest.raises(ValueError, match="no"):
            asked[0].result()
        assert asked[1].cancelled()
        workers.close()

    asyncio.run(story())


def test_work_aside_holds_nothing_else_up():
    async def story() -> None:
        workers, done = Workers(1), threading.Event()
        waits = asyncio.ensure_future(workers.run_aside(done.wait))
        for run in (workers.run, workers.run_alone, workers.run_slowly):
            assert await run(lambda: "done") == "done"
        done.set()
        assert await waits
        workers.close()

    asyncio.run(story())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux")
def test_only_what_nobody_waits_for_has_a_lower_priority():
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def story() -> None:
        workers, mine = Workers(1), niceness()
        for run in (workers.run, workers.run_alone):
            assert await run(niceness) == mine
        for run in (workers.run_slowly, workers.run_aside):
            assert await run(niceness) == min(19, mine + BACKGROUND_NICENESS)
        assert niceness() == mine
        workers.close()

    asyncio.run(story())


def test_work_with_rests_takes_its_share_of_the_time_until_the_service_drains(monkeypatch: pytest.MonkeyPatch):
    rests: list[float] = []
    monkeypatch.setattr(workers_module, "time", SimpleNamespace(sleep=rests.append))
    workers = Workers(1)
    workers.resting(0.25)(2.0)
    workers.resting(1.0)(2.0)
    assert rests == [6.0, 0.0]
    workers.draining = True
    with pytest.raises(DrainingError):
        workers.resting(0.25)(2.0)
    assert len(rests) == 2
    workers.close()
