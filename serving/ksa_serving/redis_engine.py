"""Cold states in Redis (or Valkey): one hash a user, written in one transaction, gone after a time without use.

A record's key is its owner, 16 bytes, and its fingerprint, 8. The owner is the hash's name, the fingerprint the first
bytes of its fields' names: so all of a user goes by one command, and there is no index that a crash, an expiry or an
eviction could leave behind. Records of a second fingerprint, while one release follows another, are read along.

Redis is a cache here: what it forgets is rebuilt from the event log. While it fails, calls are refused at once
(`circuit.py`), so that answers wait for it once and not each. Calls are synchronous, in worker threads: a cancelled
request never leaves half a reply on a connection that another user's request would then read. And every record says
whose it is, and is verified.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import redis

from ksa_serving.circuit import Circuit, CircuitOpenError
from ksa_serving.cold_store import BytesEngine, EngineAwayError, EngineError

T = TypeVar("T")
PREFIX = b"ksa:user:"
"""Of every hash's name."""
PROBE = b"ksa:probe"
OWNER_BYTES, KEY_BYTES = 16, 24
PAGE = 100
"""Users looked at in one call: all of them may take longer than one call may."""


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
        name, fingerprint = _split(key)

        def work() -> Any:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.hgetall(name)
                pipe.expire(name, self._seconds)
                fields = ((memoryview(field).tobytes(), part) for field, part in pipe.execute()[0].items())
                return {
                    field.removeprefix(fingerprint): memoryview(part).tobytes()
                    for field, part in fields
                    if field.startswith(fingerprint)
                }

        return self._call(work)

    def read_part(self, key: bytes, name: bytes) -> bytes | None:
        """Return one part."""
        user, fingerprint = _split(key)

        def work() -> Any:
            found: Any = self._client.hget(user, fingerprint + name)  # type: ignore[arg-type]
            return None if found is None else memoryview(found).tobytes()

        return self._call(work)

    def write(self, key: bytes, parts: Mapping[bytes, bytes], gone: Iterable[bytes]) -> None:
        """Write parts of a record, all or none."""
        user, fingerprint = _split(key)
        removed = [fingerprint + name for name in gone]
        written: Any = {fingerprint + name: part for name, part in parts.items()}

        def work() -> Any:
            with self._client.pipeline(transaction=True) as pipe:
                if removed:
                    pipe.hdel(user, *removed)  # type: ignore[arg-type]
                if written:
                    pipe.hset(user, mapping=written)
                pipe.expire(user, self._seconds)
                return pipe.execute()

        self._call(work)

    def remove(self, prefix: bytes) -> None:
        """Remove records whose keys start with `prefix`: a user's, or one record; shorter ones search the server."""
        user, fingerprint = _split(prefix)
        if len(prefix) < OWNER_BYTES:
            for users in self._pages(user + b"*"):
                self._call(partial(self._client.unlink, *users))
        elif not fingerprint:
            self._call(partial(self._client.unlink, user))
        else:
            self._remove_fields([user], fingerprint)

    def remove_ending(self, suffix: bytes) -> None:
        """Remove records whose keys end with `suffix`, a fingerprint."""
        for users in self._pages(PREFIX + b"*"):
            self._remove_fields(users, suffix)

    def record_keys(self) -> Iterator[bytes]:
        """Yield the keys of all records, those of other logs too."""
        for users in self._pages(PREFIX + b"*"):
            for user, fields in zip(users, self._fields(users)):
                owner = bytes.fromhex(user.removeprefix(PREFIX).decode())
                yield from {owner + field[: KEY_BYTES - OWNER_BYTES] for field in fields}

    def probe(self) -> None:
        """Set a key that is gone a second later."""
        self._call(lambda: self._client.set(PROBE, b"", ex=1))

    def num_records(self) -> int:
        """Return of how many users the server keeps records."""
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

    def _remove_fields(self, users: Sequence[bytes], fingerprint: bytes) -> None:
        """Remove what is of `fingerprint`; what is written meanwhile may stay without its head, and is no record."""
        gone = [
            (user, [field for field in fields if field.startswith(fingerprint)])
            for user, fields in zip(users, self._fields(users))
        ]

        def work() -> None:
            with self._client.pipeline(transaction=False) as pipe:
                for user, fields in gone:
                    if fields:
                        pipe.hdel(user, *fields)  # type: ignore[arg-type]
                pipe.execute()

        self._call(work)

    def _fields(self, users: Sequence[bytes]) -> list[list[bytes]]:
        """Return the names of each user's fields."""

        def work() -> list[list[bytes]]:
            with self._client.pipeline(transaction=False) as pipe:
                for user in users:
                    pipe.hkeys(user)  # type: ignore[arg-type]
                return [[memoryview(field).tobytes() for field in fields] for fields in pipe.execute()]

        return self._call(work)

    def _pages(self, pattern: bytes) -> Iterator[list[bytes]]:
        """Yield the names of users' hashes a page at a time."""
        cursor = None
        while cursor != 0:
            cursor, found = self._call(partial(self._client.scan, cursor or 0, pattern, PAGE))  # type: ignore[misc]
            users: list[Any] = found
            if users:
                yield users

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


def _split(key: bytes) -> tuple[bytes, bytes]:
    """Return the name of the hash and the prefix of its fields that a record's key, or the start of one, says."""
    return PREFIX + key[:OWNER_BYTES].hex().encode(), key[OWNER_BYTES:]
