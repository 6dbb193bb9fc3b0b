"""The event log's one writer: a thread that commits all calls that wait as one transaction (group commit)."""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import apsw

from ksa_serving.errors import DeadlineError, EventLogError, OverloadedError, ServiceError
from ksa_serving.events import NewEvent, Owner
from ksa_serving.log_entries import LogEntries
from ksa_serving.page_gaps import owes_wiping, settle_wiping, wipe_gaps
from ksa_serving.sqlite_file import BUSY_MILLISECONDS, FORMAT, transaction

logger = logging.getLogger(__name__)

T = TypeVar("T")
GATHER_SECONDS = 0.002
"""After a commit of several calls the next waits so long, to hold more: that spares processor time under load. Calls
that come one by one never wait."""
WIPED_AT_ONCE = 256
"""Pages whose gaps are overwritten between two looks for calls that wait."""


@dataclass(frozen=True)
class _Call(Generic[T]):
    """Work done inside the writer's transaction.

    size: of the transaction, in events. inserts: what it will insert, to be looked up together with others'. deadline:
    on `time.monotonic`'s clock; work begins before it or not at all.
    """

    work: Callable[[], T]
    size: int
    inserts: tuple[Owner, Sequence[NewEvent]] | None
    deadline: float
    future: "Future[T]"


class LogWriter:
    """Commits calls in the order in which they came. Its methods may be called from any thread.

    healthy: whether the last commit succeeded, or failed for a reason that is not the disk's.
    on_commit: told how long each transaction took, in seconds; how long of that its end, which waits for the disk;
        and how many calls it held.
    """

    def __init__(self, connection: apsw.Connection, entries: LogEntries, group_size: int, waiting_calls: int):
        """Start the thread.

        Args:
            entries: what the calls' work changes.
            group_size: events in one transaction, at most one call more.
            waiting_calls: calls that may wait before others are refused.
        """
        self.healthy = True
        self.on_commit: Callable[[float, float, int], None] = lambda seconds, sync_seconds, num_calls: None
        self.purging = owes_wiping(connection) or bool(connection.execute("SELECT 1 FROM purges").fetchone())
        self._wiped_pages = 0
        self._connection = connection
        self._entries = entries
        self._group_size = group_size
        self._crowded = False
        self._waiting_calls = waiting_calls
        self._waiting: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._write_calls, name="event-log", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Calls that wait."""
        return self._waiting.qsize()

    def submit(
        self,
        work: Callable[[], T],
        size: int,
        inserts: tuple[Owner, Sequence[NewEvent]] | None = None,
        deadline: float = math.inf,
    ) -> "Future[T]":
        """Ask for `work`; the future has what it returned once that is on disk.

        Raises:
            OverloadedError: too many calls wait already.
            EventLogError: the log is closed. From the future: it could not be written; nothing of it was kept.
            DeadlineError: from the future: it passed; nothing of it was kept.
        """
        call = _Call(work, size, inserts, deadline, Future())
        with self._closing:
            if self._closed:
                raise EventLogError("event log: expected an open log, got a closed one. The service is stopping.")
            if self._waiting.qsize() >= self._waiting_calls:
                raise OverloadedError("event log: too many calls wait to be written. Try again in a second.")
            self._waiting.put(call)
        return call.future

    def probe(self) -> None:
        """Try to write without keeping anything, so that `healthy` tells of recovery also when no events come."""
        with contextlib.suppress(OverloadedError, EventLogError):
            self.submit(lambda: self._connection.pragma("user_version", FORMAT), 0)  # a page is written

    def close(self) -> bool:
        """Write what waits and end the thread; return False if that was done before."""
        with self._closing:
            first, self._closed = not self._closed, True
        if first:
            self._waiting.put(None)
            self._thread.join()
        return first

    def step(self) -> bool:
        """Commit calls that wait; without any, overwrite some rows; without those, wait. False once closed.

        The thread does nothing else; a simulation that has none calls it instead.
        """
        group, open_ = self._next_group()
        self._crowded = len(group) > 1
        if group:
            self._commit(group)
        elif self.purging:
            self._purge()
        return open_

    def _write_calls(self) -> None:
        while self.step():
            if self._crowded:
                time.sleep(GATHER_SECONDS)

    def _next_group(self) -> tuple[list[_Call[Any]], bool]:
        """Return all calls that wait, up to the size of one transaction, and whether more may come."""
        group: list[_Call[Any]] = []
        size = 0
        try:
            call = self._waiting.get(block=not self.purging)
        except queue.Empty:
            return group, True
        while call is not None:
            if not call.future.set_running_or_notify_cancel():
                pass
            elif call.deadline < time.monotonic():
                call.future.set_exception(DeadlineError("deadline: it passed while the call waited to be written."))
            else:
                group.append(call)
                size += call.size
            if size >= self._group_size:
                return group, True
            try:
                call = self._waiting.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _commit(self, group: list[_Call[Any]]) -> None:
        began = time.perf_counter()
        try:
            with transaction(self._connection):
                self._entries.look_up([call.inserts for call in group if call.inserts is not None])
                results = [call.work() for call in group]
                self._entries.save()
                worked = time.perf_counter()
        except Exception as error:
            self._entries.reset()
            if len(group) > 1:  # one call must not fail its neighbours
                for call in group:
                    self._commit([call])
                return
            self.healthy = not isinstance(error, (apsw.Error, OSError))
            group[0].future.set_exception(_reason(error))
        else:
            self._entries.committed()
            self.healthy = True
            ended = time.perf_counter()
            self.on_commit(ended - began, ended - worked, len(group))
            for call, result in zip(group, results):
                call.future.set_result(result)

    def _purge(self) -> None:
        """Overwrite some rows; when none are left, some pages' gaps, with the write-ahead log emptied before."""
        try:
            with transaction(self._connection):
                if self._entries.purge():
                    self._wiped_pages = 0
                    return
            self._empty_write_ahead_log()
            if self._wipe_some():
                return
            with transaction(self._connection):
                settle_wiping(self._connection)
            self._empty_write_ahead_log()
            self._wiped_pages = 0
            self.purging = False
        except apsw.BusyError:
            time.sleep(0.05)
        except apsw.Error:
            self.healthy = False
            time.sleep(0.5)

    def _wipe_some(self) -> bool:
        """Overwrite some pages' gaps; return whether there are more pages."""
        try:
            more = wipe_gaps(self._connection, self._wiped_pages + 1, WIPED_AT_ONCE)
        except EventLogError as error:  # the file is too large for it
            logger.error("%s", error)
            return False
        self._wiped_pages += WIPED_AT_ONCE
        return more

    def _empty_write_ahead_log(self) -> None:
        """Empty it, or raise at once where a reader still looks at old pages: calls must not wait for that."""
        self._connection.set_busy_timeout(0)
        try:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)  # the pragma hides "busy"
        finally:
            self._connection.set_busy_timeout(BUSY_MILLISECONDS)


def _reason(error: Exception) -> ServiceError:
    """Return why a call was not kept: as its own work said, or because the disk failed."""
    if isinstance(error, ServiceError):
        return error
    reason = EventLogError(f"event log: cannot be written: {error}. Nothing of this call was kept; try again.")
    reason.__cause__ = error
    return reason
