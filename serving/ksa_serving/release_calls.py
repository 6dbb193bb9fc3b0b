"""Calls that change what is served: load a run, activate it, roll back. One at a time; requests go on meanwhile."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

from ksa_serving.messages import ReleaseInfo, ReleasesAnswer, WarmingInfo
from ksa_serving.models import Model
from ksa_serving.releases import Releases, Served
from ksa_serving.settings import ServeSettings
from ksa_serving.state_store import StateRecord, StateStore
from ksa_serving.workers import DrainingError, Workers

logger = logging.getLogger(__name__)

TOLD_SECONDS = 10.0
"""How often the log says how far the warming of a release is."""


class ReleaseCalls:
    """One service's releases, changed by its operator. They run on one event loop.

    Args:
        models: the model of each state fingerprint in use; those that retire are taken out.
        settings: `warm_users` and `warm_share` are of a release that is loaded.
    """

    def __init__(
        self,
        releases: Releases,
        store: StateStore,
        workers: Workers,
        models: dict[str, Model],
        settings: ServeSettings,
    ):
        self._releases = releases
        self._store = store
        self._workers = workers
        self._models = models
        self._settings = settings
        self._changing = asyncio.Lock()
        self._warming: WarmingInfo | None = None

    async def load(self, run: str) -> ReleasesAnswer:
        """Load a run and make the states of the last active users ready; what is served goes on.

        Raises:
            ReleaseError: it cannot take the active one's place.
        """
        async with self._changing:
            began = time.monotonic()
            served = await self._workers.run_aside(self._releases.load, run)
            loaded = time.monotonic()
            warmed = await self._workers.run_aside(self._warm, served)
            took = time.monotonic() - loaded
            logger.info("release %s: loaded in %.1f s, states of %d users in %.1f s", run, loaded - began, warmed, took)
            return self.list()

    async def activate(self, run: str) -> ReleasesAnswer:
        """Serve a loaded release from the next request on."""
        async with self._changing:
            before = self._releases.fingerprints()
            self._releases.activate(run)
            self._read_by_active()
            for fingerprint in before - self._releases.fingerprints():
                await self._workers.run(self._store.retire, fingerprint)
                self._models.pop(fingerprint, None)
            return self.list()

    async def roll_back(self) -> ReleasesAnswer:
        """Serve the previous release again from the next request on."""
        async with self._changing:
            self._releases.roll_back()
            self._read_by_active()
            return self.list()

    def drain(self) -> ReleasesAnswer:
        """Turn unready, so that a proxy sends no more; requests are still answered."""
        self._workers.draining = True
        return self.list()

    def list(self) -> ReleasesAnswer:
        """Return all releases loaded."""
        held = [_info("active", self._releases.active)]
        if self._releases.previous is not None:
            held.append(_info("previous", self._releases.previous))
        held += [_info("loaded", served) for served in self._releases.loaded.values()]
        return ReleasesAnswer(held, self._workers.draining, self._warming)

    def _read_by_active(self) -> None:
        """Have cold states read by the active model, also where an older one has the same fingerprint."""
        release = self._releases.active.release
        self._models[release.state_fingerprint] = release.model

    def _warm(self, served: Served) -> int:
        """Make states ready in a release that is not active yet, the last active users' first; return how many.

        Not where it reads the active one's: states are then made anew one by one, where its items ask for it.
        """
        if served.release.state_fingerprint == self._releases.active.release.state_fingerprint:
            return 0
        states = served.states.resting(self._telling(self._workers.resting(self._settings.warm_share)))
        records: Callable[[], list[StateRecord]] = getattr(getattr(self._store, "memory", self._store), "records", list)
        owners = list(dict.fromkeys(record.owner for record in reversed(records())))[: self._settings.warm_users]
        try:
            for warmed, owner in enumerate(owners):
                self._warming = WarmingInfo(served.release.name, warmed, len(owners))
                try:
                    states.settle(owner)  # whole, however long: nobody waits for it
                except DrainingError:
                    return warmed
            return len(owners)
        finally:
            self._warming = None

    def _telling(self, rest: Callable[[float], None]) -> Callable[[float], None]:
        """Return what rests and now and then logs how far the warming is, also in the midst of one long state."""
        told = time.monotonic()

        def telling(seconds: float) -> None:
            nonlocal told
            now, warming = time.monotonic(), self._warming
            if warming is not None and now - told >= TOLD_SECONDS:
                told = now
                logger.info("release %s: states of %d of %d users", warming.run, warming.warmed, warming.to_warm)
            rest(seconds)

        return telling


def _info(role: Literal["active", "previous", "loaded"], served: Served) -> ReleaseInfo:
    release = served.release
    return ReleaseInfo(release.model_version, release.index_version, release.state_fingerprint, release.name, role)
