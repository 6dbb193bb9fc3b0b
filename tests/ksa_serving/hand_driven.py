"""Event logs without a thread: their writers take the next step when a test says."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from ksa_serving import log_writer, sqlite_file
from ksa_serving.event_log import EventLog

T = TypeVar("T")


class NoThread:
    """What a thread would do is done when it is waited for."""

    def __init__(self, target: Callable[[], None], **_: object):
        self._target = target

    def start(self) -> None:
        pass

    def join(self) -> None:
        self._target()


class NoWaiting:
    """The module `time`, but for sleep."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        pass


@contextlib.contextmanager
def hand_driven_logs(draw: random.Random) -> Iterator[None]:
    """Logs opened here have no thread, nothing waits, and what is secret is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_writer, "threading", SimpleNamespace(Thread=NoThread, Lock=threading.Lock))
        patch.setattr(log_writer, "time", NoWaiting())
        patch.setattr(sqlite_file, "secrets", SimpleNamespace(token_bytes=draw.randbytes))
        yield


def done(log: EventLog, future: "Future[T]") -> T:
    """Let the writer work until it has an answer, and return that."""
    while not future.done():
        log.writer.step()
    return future.result()
