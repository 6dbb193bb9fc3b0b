"""Cold states in Redis (or Valkey): one hash a record, written in one transaction, gone after a time without use.

Redis is a cache here: what it forgets is rebuilt from the event log. While it fails, calls are refused at once
(`circuit.py`), so that answers wait for it once and not each. Calls are synchronous, in worker threads: a cancelled
request never leaves half a reply on a connection that another user's request would then read. And every record says
whose it is, and is verified.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import redis

from ksa_serving.circuit import Circuit, CircuitOpenError
from ksa_serving.cold_store import BytesEngine, EngineAwayError, EngineError

T = TypeVar("T")
PREFIX = b"ksa:state:"
"""Of every record's name."""


class RedisEngine(BytesEngine):
    """Records in a Redis server.

    Args:
        url: `redis://host:port/db`, `rediss://` for TLS, or `unix://path`.
        seconds: after which an unused record is forgotten.
        timeout: in seconds, of a connection and of every piece of an answer.
        whole_timeout: of a whole call; a server that sends a byte now and then is hanging too.
        retry_after: how long calls are refused at once after one failed.
    """

    def __init__(
        self,
        url: str,
        seconds: int = 30 * 86_400,
        timeout: float = 0.25,
        whole_timeout: float = 0.75,
        retry_after: float = 1.0,
    ):
        self._client = redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=None, health_check_interval=0
        )
        self._seconds = seconds
        self._whole_timeout = whole_timeout
        self._circuit = Circuit(retry_after)
        self._began: dict[int, float] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._end_hanging, name="redis-watch", daemon=True).start()

    def read(self, key: bytes) -> dict[bytes, bytes]:
        """Return all parts of a record; it is kept for longer."""

        def work() -> Any:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.hgetall(_name(key))
                pipe.expire(_name(key), self._seconds)
                return {
                    memoryview(name).tobytes(): memoryview(part).tobytes() for name, part in pipe.execute()[0].items()
                }

        return self._call(work)

    def read_part(self, key: bytes, name: bytes) -> bytes | None:
        """Return one part."""

        def work() -> Any:
            found: Any = self._client.hget(_name(key), name)  # type: ignore[arg-type]
            return None if found is None else memoryview(found).tobytes()

        return self._call(work)

    def write(self, key: bytes, parts: Mapping[bytes, bytes], gone: Iterable[bytes]) -> None:
        """Write parts of a record, all or none."""
        gone = list(gone)

        def work() -> Any:
            with self._client.pipeline(transaction=True) as pipe:
                if gone:
                    pipe.hdel(_name(key), *gone)  # type: ignore[arg-type]
                if parts:
                    pipe.hset(_name(key), mapping=dict(parts))  # type: ignore[arg-type]
                pipe.expire(_name(key), self._seconds)
                return pipe.execute()

        self._call(work)

    def remove(self, prefix: bytes) -> None:
        """Remove records whose keys start with `prefix`."""
        if len(prefix) == 24:
            self._call(lambda: self._client.delete(_name(prefix)))
        else:
            self._remove_matching(_name(prefix) + b"*")

    def remove_ending(self, suffix: bytes) -> None:
        """Remove records whose keys end with `suffix`."""
        self._remove_matching(PREFIX + b"*" + suffix.hex().encode())

    def record_keys(self) -> Iterator[bytes]:
        """Yield the keys of all records, those of other logs too."""
        for names in self._pages(PREFIX + b"*"):
            yield from self._call(partial(_keys, names))

    def num_records(self) -> int:
        """Return how many records the server keeps."""
        return self._call(lambda: int(self._client.dbsize()))  # type: ignore[arg-type]

    def nbytes(self) -> int:
        """Return the server's bytes in use."""
        return int(self._call(lambda: self._client.info("memory"))["used_memory"])  # type: ignore[index]

    @property
    def is_available(self) -> bool:
        """Whether the last call succeeded."""
        return not self._circuit.is_open

    def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        self._client.close()

    def _remove_matching(self, pattern: bytes) -> None:
        for names in self._pages(pattern):
            self._call(partial(self._client.delete, *names))

    def _pages(self, pattern: bytes) -> Iterator[list[Any]]:
        """Yield records' names a page at a time: all of them may take longer than one call may."""
        cursor = None
        while cursor != 0:
            cursor, names = self._call(partial(self._client.scan, cursor or 0, pattern, 1000))  # type: ignore[misc]
            if names:
                yield names

    def _call(self, work: Callable[[], T]) -> T:
        me = threading.get_ident()
        try:
            with self._circuit.call():
                self._began[me] = time.monotonic()
                return work()
        except CircuitOpenError as error:
            raise EngineAwayError("redis: it failed a moment ago") from error
        except Exception as error:  # a server that answers nonsense makes the client raise anything
            # What is still to come on a connection is not for whoever asks next.
            self._client.connection_pool.disconnect(inuse_connections=False)
            raise EngineError(f"redis: {error}") from error
        finally:
            self._began.pop(me, None)

    def _end_hanging(self) -> None:
        """Close connections under calls that take too long in all."""
        while not self._closed.wait(self._whole_timeout / 4):
            oldest = min(list(self._began.values()), default=None)
            if oldest is not None and time.monotonic() - oldest > self._whole_timeout:
                self._client.connection_pool.disconnect(inuse_connections=True)  # its reader is told at once


def _keys(names: Iterable[bytes]) -> list[bytes]:
    return [bytes.fromhex(name.removeprefix(PREFIX).decode()) for name in names]


def _name(key: bytes) -> bytes:
    return PREFIX + key.hex().encode()
