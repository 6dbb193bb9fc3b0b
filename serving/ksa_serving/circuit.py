"""A circuit breaker: whoever calls a server that failed a moment ago is refused at once, so that it is waited for once.

*Closed*: calls go through. The first that fails opens it. *Open*: calls are refused for a time; then one call goes
through, and while that is under way the others are still refused. It closes the circuit, or opens it again.
"""

import contextlib
import threading
import time
from collections.abc import Iterator


class CircuitOpenError(Exception):
    """The server failed a moment ago; nothing was sent to it."""


class Circuit:
    """Safe to share between threads.

    num_opened: how often it opened.

    Args:
        seconds: for which calls are refused after one failed.
    """

    def __init__(self, seconds: float):
        self.num_opened = 0
        self._seconds = seconds
        self._open_until: float | None = None
        self._trying = False
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the last call that went through failed."""
        return self._open_until is not None

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Let the body run, and learn from how it ends.

        Raises:
            CircuitOpenError: it is open.
        """
        tries = False
        with self._lock:
            if self._open_until is not None:
                if self._trying or time.monotonic() < self._open_until:
                    raise CircuitOpenError
                self._trying = tries = True
        try:
            yield
        except BaseException:
            self._end(tries, time.monotonic() + self._seconds)
            raise
        self._end(tries, None)

    def _end(self, tried: bool, open_until: float | None) -> None:
        """Note the end of a call. One that began before another failed does not close what that one opened."""
        with self._lock:
            if tried:
                self._trying = False
            if open_until is not None:
                self.num_opened += self._open_until is None
            elif self._open_until is not None and not tried:
                return
            self._open_until = open_until
