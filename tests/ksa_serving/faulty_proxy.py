"""A TCP proxy that treats a server's replies as a test says. It runs in a thread of its own, on asyncio."""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Literal, TypeVar

from held_port import held_port

T = TypeVar("T")
Mode = Literal["pass", "refuse", "cut", "reset", "hang", "slow", "trickle", "garbage", "swap", "repeat"]
HANGS = 10.0


class FaultyProxy:
    """Between clients and a server on loopback.

    mode: what happens to replies from now on. `pass`: nothing. `refuse`: connections are refused, those there cut.
    `cut`: the connection ends in place of the reply. `reset`: a part of the reply, then a reset. `hang`: it comes after
    10 s. `slow`: after a twentieth of a second at most. `trickle`: one byte at a time. `garbage`: other bytes.
    `swap`: it goes to another connection, and that one's comes here. `repeat`: the last reply comes in its place.
    share: of replies to which it happens. done: how often it has.
    """

    def __init__(self, target: int, port: int, seed: int):
        self.mode: Mode = "pass"
        self.share = 1.0
        self.done = 0
        self._draw = random.Random(seed)
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._held: asyncio.Future[bytes] | None = None
        self._last = b"+OK\r\n"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server: asyncio.Server | None = None
        self.port = port
        self._run(self._listen())

    def set(self, mode: Mode, share: float = 1.0) -> None:
        """Treat replies so from now on."""
        self._run(self._set(mode, share))

    def close(self) -> None:
        """Cut everything and end the thread."""
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    async def _set(self, mode: Mode, share: float) -> None:
        self.mode, self.share = mode, share
        if mode == "refuse":
            await self._stop()
        elif self._server is None:
            await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _end(self) -> None:
        await self._stop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
            mine = {writer, server_writer}
            self._writers |= mine
            try:
                passing = [self._questions(reader, server_writer), self._replies(server_reader, writer)]
                tasks = [asyncio.create_task(work) for work in passing]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                self._writers -= mine
                for end in mine:
                    end.transport.abort()

    async def _questions(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            mode = self.mode if self._draw.random() < self.share else "pass"
            self.done += mode != "pass"
            if mode == "cut":
                return
            if mode == "reset":
                writer.write(data[: self._draw.randrange(len(data))])
                await writer.drain()
                linger = struct.pack("ii", 1, 0)  # closing resets
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return
            if mode in ("hang", "slow"):
                await asyncio.sleep(HANGS if mode == "hang" else self._draw.random() / 20)
            if mode == "trickle":
                for at in range(len(data)):
                    writer.write(data[at : at + 1])
                    await asyncio.sleep(0.1)
                continue
            if mode == "garbage":
                data = self._garbage(data)
            if mode == "swap":
                data = await self._swapped(data)
            if mode == "repeat":
                data, self._last = self._last, data
            else:
                self._last = data
            writer.write(data)
            await writer.drain()

    def _garbage(self, data: bytes) -> bytes:
        """Return other bytes, or the same with some changed."""
        if self._draw.random() < 0.5:
            return self._draw.randbytes(self._draw.randint(1, 200))
        changed = bytearray(data)
        for _ in range(self._draw.randint(1, 5)):
            changed[self._draw.randrange(len(changed))] = self._draw.randrange(256)
        return bytes(changed)

    async def _swapped(self, data: bytes) -> bytes:
        """Return what another connection was to have, and give it this."""
        if self._held is not None and not self._held.done():
            other, self._held = self._held, None
            theirs: bytes = other.mine  # type: ignore[attr-defined]
            other.set_result(data)
            return theirs
        self._held = mine = _Held(data)
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(mine, 0.02)
        return data


class _Held(asyncio.Future[bytes]):
    """A reply that waits for one to be exchanged with."""

    def __init__(self, mine: bytes):
        super().__init__()
        self.mine = mine


@contextlib.contextmanager
def faulty_proxy(target: int, seed: int) -> Iterator[FaultyProxy]:
    """A proxy for the time of a test."""
    with held_port() as port:  # also while it refuses
        proxy = FaultyProxy(target, port, seed)
        try:
            yield proxy
        finally:
            proxy.close()
