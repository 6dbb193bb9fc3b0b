"""What is done in the background: states catch up, long rebuilds, audits, overwriting what was deleted."""

import asyncio
import contextlib
import logging
import random
import time
from itertools import islice
from typing import NamedTuple

from ksa_serving.buckets import Buckets
from ksa_serving.event_log import EventLog
from ksa_serving.events import Owner
from ksa_serving.metrics import Metrics
from ksa_serving.releases import Releases, Served
from ksa_serving.room import Room
from ksa_serving.settings import ServeSettings
from ksa_serving.state_store import StateRecord, StateStore
from ksa_serving.user_locks import UserLocks
from ksa_serving.workers import DrainingError, Workers

logger = logging.getLogger(__name__)

MAX_BEHIND = 10_000
"""Users whose states may wait to catch up; others catch up when next asked for."""
CAUGHT_UP_TOGETHER = 8
"""States that catch up in one pass, some milliseconds: a question of one of these users waits for all of them."""
SHARE_WHILE_CROWDED = 0.25
"""Of the time that states have to follow, while writes crowd: who writes waits for nobody more then."""
MAX_SETTLING = 1024
"""Users whose states may wait to be computed at length."""


class _Behind(NamedTuple):
    """Since when, on `time.monotonic`'s clock, a user's state may be behind the log, and by how many entries."""

    since: float
    num_entries: int


class Upkeep:
    """One service's background work. Nothing waits for it. Its methods run on one event loop."""

    def __init__(
        self,
        log: EventLog,
        store: StateStore,
        releases: Releases,
        locks: UserLocks,
        workers: Workers,
        metrics: Metrics,
        settings: ServeSettings,
        replays: Buckets[Owner],
        writing: Room,
    ):
        self._log = log
        self._store = store
        self._releases = releases
        self._locks = locks
        self._workers = workers
        self._metrics = metrics
        self._settings = settings
        self._replays = replays
        self._writing = writing
        self._behind: dict[Owner, _Behind] = {}
        self._catching_up = False
        self._at_work: float | None = None
        self._settling: dict[Owner, bool] = {}
        self._purging: asyncio.Task[None] | None = None
        self._auditing = False

    @property
    def num_settling(self) -> int:
        """Users whose states are computed at length."""
        return len(self._settling)

    @property
    def lag_seconds(self) -> float:
        """How long the state that waits longest, or is at work, has not followed the log."""
        now = time.monotonic()
        if self._at_work is not None:
            return now - self._at_work
        return now - next((behind.since for behind in self._behind.values()), now)

    @property
    def lag_entries(self) -> int:
        """Entries of the log that no state was asked to follow yet."""
        return sum(behind.num_entries for behind in self._behind.values())

    def is_settling(self, owner: Owner) -> bool:
        """Whether a user's state is computed at length, or waits for it, and answers are degraded until then."""
        return self._settling.get(owner, False)

    def catch_up(self, owner: Owner, num_entries: int = 1) -> None:
        """Bring a held state up to the log, together with others' that are behind; a hint, done when there is time."""
        if len(self._behind) >= MAX_BEHIND or self._workers.draining:
            return
        behind = self._behind.get(owner, _Behind(time.monotonic(), 0))
        self._behind[owner] = behind._replace(num_entries=behind.num_entries + num_entries)
        if not self._catching_up:
            self._catching_up = True
            self._workers.begin(self._catch_up())

    def settle(self, owner: Owner) -> None:
        """Compute a state at length, one user after the other, once what its user's last replays cost has refilled."""
        if owner not in self._settling and len(self._settling) < MAX_SETTLING and not self._workers.draining:
            self._settling[owner] = True
            self._workers.begin(self._settle(owner))

    def forget(self, owner: Owner) -> None:
        """Degrade no answers any more for what a deleted user's state was to know."""
        if owner in self._settling:
            self._settling[owner] = False

    def audit(self, served: Served, record: StateRecord) -> None:
        """Compute a share of the states that were used anew, one at a time, and compare."""
        if random.random() < self._settings.audit_share and not self._auditing:
            self._auditing = True
            self._workers.begin(self._audit(served, record))

    def purge(self) -> None:
        """Have what was deleted overwritten."""
        if self._purging is None or self._purging.done():
            self._purging = self._workers.begin(self._purge())

    @property
    def catch_up_share(self) -> float:
        """Return the share of the time in which states follow: less while writes crowd, until they lag by much."""
        eased = self._writing.is_crowded and self.lag_seconds < self._settings.unready_after_seconds / 4
        return self._settings.catch_up_share * (SHARE_WHILE_CROWDED if eased else 1)

    async def _catch_up(self) -> None:
        """Go on while states are behind, a batch after the other, for a share of the time: answers need the rest."""
        try:
            with contextlib.suppress(TimeoutError):  # events of a user are caught up with together
                await asyncio.wait_for(self._workers.closing.wait(), self._settings.catch_up_seconds)
            while self._behind and not self._workers.draining:
                began = time.monotonic()
                await self._catch_up_some()
                took = time.monotonic() - began
                await asyncio.sleep(took * (1 / self.catch_up_share - 1))
        finally:
            self._catching_up = False

    async def _catch_up_some(self) -> None:
        states = self._releases.active.states
        free = (owner for owner in self._behind if not self._locks.of(owner).locked())
        owners = list(islice(free, CAUGHT_UP_TOGETHER))
        # From here on, what is kept needs another turn.
        self._at_work = min(self._behind.pop(owner).since for owner in owners or list(self._behind))
        try:
            async with contextlib.AsyncExitStack() as held:
                for owner in owners:
                    await held.enter_async_context(self._locks.of(owner))
                caught_up = await self._workers.run(states.current_together, owners)
            for owner, current in zip(owners, caught_up):
                if current is None:  # late, retracted, or many events
                    async with self._locks.of(owner):
                        done = await self._workers.run_alone(states.catch_up, owner)
                    if not done:
                        self.settle(owner)
        except Exception:  # the events are safe; the next answers try again
            logger.exception("states could not catch up with the event log")
            for owner in owners:
                self._store.drop(owner)
        finally:
            self._at_work = None

    async def _settle(self, owner: Owner) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._workers.closing.wait(), self._replays.wait(owner))
            if self._workers.draining:
                return
            # Not under the user's lock: answers go on meanwhile, and a record never replaces one that knows more.
            record = await self._workers.run_slowly(self._settled, owner)
            moved = self._log.ownership is not None and not self._log.ownership.owns(owner.user_id)
            if moved or (await self._workers.run(self._log.head, owner)).generation != record.generation:
                self._store.drop(owner)
                self.purge()
        except DrainingError:
            logger.info("a state is not computed any more: the service ends")
        except Exception:
            logger.exception("a state could not be computed in the background")
        finally:
            del self._settling[owner]

    def _settled(self, owner: Owner) -> StateRecord:
        """Return the whole state, in the thread for it: with rests where a state is held, from which answers come."""
        states = self._releases.active.states
        if self._store.ready(owner, states.release.state_fingerprint) is not None:
            states = states.resting(self._workers.resting(self._settings.settle_share))
        return states.settle(owner)

    async def _audit(self, served: Served, record: StateRecord) -> None:
        """Compute a state anew and compare; one that differs is dropped, counted, and told loudly."""
        try:
            difference = await self._workers.run_slowly(served.states.audit, record)
            if difference is None:
                return
            settings = self._settings
            exact = record.parity == "exact"
            equal = difference <= (settings.audit_tolerance if exact else settings.audit_tolerance_int8)
            self._metrics.audits.labels("equal" if equal else "different").inc()
            if not equal:
                logger.error("audit: a state differs from its log by %.1e; it is dropped", difference)
                await self._workers.run(self._store.drop, record.owner)
        finally:
            self._auditing = False

    async def _purge(self) -> None:
        """Try again until nothing is left of what was deleted."""
        closing, wait = self._workers.closing, self._settings.purge_after_seconds
        while True:
            with contextlib.suppress(TimeoutError):  # deletions that come together are purged together
                await asyncio.wait_for(closing.wait(), wait)
            if await self._workers.run_slowly(self._store.purge) or closing.is_set():
                return
            wait = 1.0
