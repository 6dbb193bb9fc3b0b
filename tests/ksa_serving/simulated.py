"""What a simulation of several processes needs: one event loop without time, network or threads, and all chance drawn.

- *Time* passes when nothing else can happen: the loop jumps to the next thing that is due.
- *Threads* are work that is done some time later, at once and alone; a pool of one thread keeps its order.
- *Processes* are contexts: what a process has begun carries its life, and goes with it when that ends.
- *Disks* are `faulty_disk.py`'s; cold stores are a dictionary that fails, forgets and mixes up.
"""

import asyncio
import contextvars
import hashlib
import heapq
import queue
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ksa_serving.cold_store import BytesEngine, EngineError

LIFE: "contextvars.ContextVar[Life | None]" = contextvars.ContextVar("life", default=None)


class Life:
    """A process from its start to its end. Whoever runs in `context` belongs to it."""

    def __init__(self) -> None:
        self.ended = False
        self.replies: dict[asyncio.Future[Any], None] = {}  # a set's order would be that of addresses
        self.context = contextvars.copy_context()
        self.context.run(LIFE.set, self)

    def end(self) -> None:
        """Nothing of it happens any more; who waits for a reply is told that nobody is there."""
        self.ended = True
        for reply in self.replies:
            if not reply.done():
                reply.set_exception(ConnectionError("the process has ended"))
        self.replies.clear()


class StandstillError(AssertionError):
    """Somebody waits, and nothing will ever happen."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop of one thread whose time is counted, and which may be entered again from within."""

    def __init__(self, draw: random.Random):
        super().__init__()
        self.draw = draw
        self.now = 0.0
        self._free_at: dict[ThreadPoolExecutor, float] = {}

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        ready, due = self._ready, self._scheduled  # type: ignore[attr-defined]
        while not ready:
            if not due:
                raise StandstillError(f"nothing is left to happen at {self.now:.3f} s")
            self.now = max(self.now, due[0]._when)
            while due and due[0]._when <= self.now:
                handle = heapq.heappop(due)
                handle._scheduled = False
                if not handle._cancelled:
                    ready.append(handle)
        handle = ready.popleft()
        life = handle._context.get(LIFE) if handle._context is not None else None
        if not handle._cancelled and (life is None or not life.ended):
            handle._run()

    def create_task(self, coro: Any, **named: Any) -> Any:
        task = super().create_task(coro, **named)
        task._log_destroy_pending = False  # type: ignore[attr-defined] # it may go with its process
        return task

    def _write_to_self(self) -> None:
        pass

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Have `func` called some time later."""
        future = self.create_future()

        def work() -> None:
            if future.cancelled() and self.draw.random() < 0.5:  # else it had begun
                return
            try:
                result = func(*args)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # told or not
            else:
                if not future.done():
                    future.set_result(result)

        at = self.now
        if isinstance(executor, ThreadPoolExecutor) and executor._max_workers == 1:
            at = max(at, self._free_at.get(executor, 0.0))
        at += self.draw.random() * 0.002
        self._free_at[executor] = at
        self.call_at(at, work)
        return future

    async def shutdown_default_executor(self, timeout: Any = None) -> None:
        pass


class SimulatedThread:
    """A log's writer: where there is something to write, it takes its next step some time later."""

    def __init__(self, target: Callable[[], None], **_: object):
        self._target = target
        self._writer: Any = target.__self__  # type: ignore[attr-defined]
        self._due = False

    def start(self) -> None:
        self._writer._waiting = WakingQueue(self._wake)
        self._later()

    def join(self) -> None:
        self._target()

    def _wake(self) -> None:
        if not self._due:
            self._later()

    def _later(self) -> None:
        loop = asyncio.get_event_loop_policy().get_event_loop()
        assert isinstance(loop, SimulatedLoop)
        self._due = True
        loop.call_later(loop.draw.random() * 0.004, self._step)

    def _step(self) -> None:
        self._due = False
        if self._writer._closed:
            return
        if self._writer.num_waiting or self._writer.purging:
            self._writer.step()
            self._later()


class WakingQueue(queue.SimpleQueue[Any]):
    """A queue that says when something comes."""

    def __init__(self, wake: Callable[[], None]):
        super().__init__()
        self._wake = wake

    def put(self, item: Any, *given: Any) -> None:
        super().put(item, *given)
        self._wake()


class SimulatedEngine(BytesEngine):
    """Records in a dictionary that outlives processes.

    fault_share: of calls that fail, before or after they did what they were to do. lie_share: of answers that are
    another record's, an older one's, or damaged.
    """

    def __init__(self, draw: random.Random):
        self.fault_share = self.lie_share = 0.0
        self.faults = 0
        self._draw = draw
        self._records: dict[bytes, dict[bytes, bytes]] = {}
        self._older: list[dict[bytes, bytes]] = []

    def read(self, key: bytes) -> dict[bytes, bytes]:
        self._fail()
        found = dict(self._records.get(key, {}))
        if found and self._draw.random() < self.lie_share:
            self.faults += 1
            kind = self._draw.randrange(3)
            if kind == 0 and self._older:
                return dict(self._draw.choice(self._older))
            if kind == 1:
                return dict(self._draw.choice(list(self._records.values())))
            name = self._draw.choice(sorted(found))
            found[name] = found[name][:-1] if self._draw.random() < 0.5 else b"\x00" + found[name][1:]
        return found

    def read_part(self, key: bytes, name: bytes) -> bytes | None:
        self._fail()
        return self._records.get(key, {}).get(name)

    def write(self, key: bytes, parts: Mapping[bytes, bytes], gone: Iterable[bytes]) -> None:
        self._fail()
        old = self._records.get(key, {})
        if old:
            self._older = [*self._older[-20:], old]
        gone = set(gone)
        self._records[key] = {name: part for name, part in old.items() if name not in gone} | dict(parts)
        self._fail()

    def probe(self) -> None:
        self._fail()

    def remove(self, prefix: bytes) -> None:
        self._fail()
        self._records = {key: parts for key, parts in self._records.items() if not key.startswith(prefix)}
        self._fail()

    def remove_ending(self, suffix: bytes) -> None:
        self._fail()
        self._records = {key: parts for key, parts in self._records.items() if not key.endswith(suffix)}

    def record_keys(self) -> Iterator[bytes]:
        self._fail()
        return iter(list(self._records))

    def num_records(self) -> int:
        return len(self._records)

    def nbytes(self) -> int:
        return sum(len(part) for parts in self._records.values() for part in parts.values())

    def close(self) -> None:
        pass

    def lose(self) -> None:
        """The power goes: some records are gone, some are what they were before."""
        for key in list(self._records):
            if self._draw.random() < 0.2:
                del self._records[key]
            elif self._older and self._draw.random() < 0.2:
                self._records[key] = self._draw.choice(self._older)

    def _fail(self) -> None:
        if self._draw.random() < self.fault_share:
            self.faults += 1
            raise EngineError("simulated")


class Trace:
    """A hash of everything that was noticed, in order: equal traces, equal runs."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.length = 0

    def __call__(self, *told: object) -> None:
        self._hash.update(repr(told).encode())
        self.length += 1

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
