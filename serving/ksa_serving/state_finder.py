"""The state that answers a request: brought up to the log under the user's lock, and how it was had."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from ksa_serving.context import Context
from ksa_serving.errors import DeadlineError
from ksa_serving.event_log import EventLog
from ksa_serving.events import Owner
from ksa_serving.messages import StateSource
from ksa_serving.releases import Releases, Served
from ksa_serving.state_store import StateRecord
from ksa_serving.upkeep import Upkeep
from ksa_serving.user_locks import UserLocks
from ksa_serving.user_states import Current
from ksa_serving.workers import Workers


@dataclass(frozen=True)
class Found:
    """A user's state for one request.

    seq: entries of this user that the log holds. stale: it was to hold more. deadline: until when work may begin.
    inspecting: whether the caller may know `source`.
    """

    served: Served
    record: StateRecord
    source: StateSource
    seq: int
    stale: bool
    deadline: float
    inspecting: bool

    def provenance(self, num_events: int, request_time: int | None) -> dict[str, Any]:
        """Return what every answer tells of where it comes from."""
        release = self.served.release
        longest = release.longest_trained_history
        return {
            "num_events": num_events,
            "model_version": release.model_version,
            "index_version": release.index_version,
            "seq": self.seq,
            "state_seq": self.record.seq,
            "state_source": self.source if self.inspecting else None,
            "state_parity": self.record.parity,
            "request_time": request_time,
            "beyond_trained_length": longest is not None and num_events > longest,
            "degraded": self.source == "degraded",
            "stale": self.stale,
        }


class StateFinder:
    """Finds states of one service's active release. Its methods run on one event loop."""

    def __init__(
        self,
        log: EventLog,
        releases: Releases,
        locks: UserLocks,
        workers: Workers,
        upkeep: Upkeep,
        deadline_seconds: float,
    ):
        self._log = log
        self._releases = releases
        self._locks = locks
        self._workers = workers
        self._upkeep = upkeep
        self._deadline_seconds = deadline_seconds

    async def find(self, owner: Owner, min_seq: int, context: Context) -> Found:
        """Return the user's state, brought up to the log.

        Args:
            min_seq: the entry of this user that it should know; waited for until the deadline.

        Raises:
            DeadlineError: it passed before the work began.
            EventLogError: the user's events cannot be read.
        """
        deadline = context.work_until(self._deadline_seconds)
        served = self._releases.active
        stale = not await self._reached(owner, min_seq, deadline)
        if stale:  # waited in vain; the answer without it is still wanted
            deadline = max(deadline, time.monotonic() + 1.0)
        async with self._locks.of(owner):
            if time.monotonic() > deadline:
                raise DeadlineError("deadline: it passed while the request waited.")
            record, source = await self._current(served, owner, deadline)
        seq = record.seq
        if source == "degraded":
            self._upkeep.settle(owner)
            seq = (await self._workers.run(self._log.head, owner)).last_seq
        elif source == served.release.model.tier:
            self._upkeep.audit(served, record)
        return Found(served, record, source, seq, stale, deadline, context.inspecting)

    async def _current(self, served: Served, owner: Owner, deadline: float) -> Current:
        """Return the user's state: together with others' where that is quick, else alone."""
        if self._upkeep.is_settling(owner):
            return await self._workers.run_alone(served.states.meanwhile, owner)
        quick = await served.updates.ask(owner, deadline)
        return quick or await self._workers.run_alone(served.states.current, owner)

    async def _reached(self, owner: Owner, min_seq: int, deadline: float) -> bool:
        """Wait until the log holds `min_seq` of this user; return False if it did not before the deadline."""
        wait = 0.002
        while min_seq and (await self._workers.run(self._log.head, owner)).last_seq < min_seq:
            if time.monotonic() + 2 * wait > deadline:
                return False
            await asyncio.sleep(wait)
            wait = min(0.05, 2 * wait)
        return True
