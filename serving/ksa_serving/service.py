"""One process's service without HTTP: its parts put together, and its life from the first request to the last.

Events go to the log (`event_calls.py`), states follow the log (`state_finder.py`, `upkeep.py`), answers come from
states (`question_calls.py`).
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from ksa_serving.batcher import Batcher
from ksa_serving.buckets import Buckets
from ksa_serving.event_calls import EventCalls
from ksa_serving.event_log import EventLog
from ksa_serving.events import Owner
from ksa_serving.metrics import Metrics
from ksa_serving.models import Model
from ksa_serving.question_calls import QuestionCalls
from ksa_serving.release import Release, load_release
from ksa_serving.release_calls import ReleaseCalls
from ksa_serving.releases import Releases, Served
from ksa_serving.room import Room, Rooms
from ksa_serving.settings import ServeSettings
from ksa_serving.shard_calls import ShardCalls
from ksa_serving.state_finder import StateFinder
from ksa_serving.state_store import StateStore
from ksa_serving.upkeep import Upkeep
from ksa_serving.user_locks import UserLocks
from ksa_serving.user_states import UserStates
from ksa_serving.workers import Workers


class Service:
    """What one process serves. `events`, `questions`, `operator` and `shards` hold its calls, all on one event loop.

    Args:
        release: what is served first.
        log: the event log; the service closes it.
        store: where states are held; the service closes it.
        clock: seconds since 1970; for the future check and missing request times.
        models: filled with the model of each state fingerprint in use; a cold store reads it.
        releases: folder of further runs that may be loaded.
        load: loads one of them by its folder.
    """

    def __init__(
        self,
        release: Release,
        log: EventLog,
        store: StateStore,
        settings: ServeSettings | None = None,
        clock: Callable[[], float] = time.time,
        models: dict[str, Model] | None = None,
        releases: Path | None = None,
        load: Callable[[Path], Release] = load_release,
    ):
        self.log = log
        self.store = store
        self.settings = settings = settings or ServeSettings()
        self.metrics = Metrics()
        self.rooms = Rooms(Room(settings.concurrent_writes), Room(settings.concurrent_questions))
        self._models = {} if models is None else models
        self.workers = workers = Workers(settings.model_threads)
        self._probing: Future[None] | None = None
        self._replays = Buckets[Owner](settings.replay_events_per_second, settings.inline_events)
        self.releases = Releases(release, releases, self._prepare, load)
        locks = UserLocks()
        self.upkeep = Upkeep(
            log, store, self.releases, locks, workers, self.metrics, settings, self._replays, self.rooms.writing
        )
        finder = StateFinder(log, self.releases, locks, workers, self.upkeep, settings.deadline_seconds)
        self.events = EventCalls(
            log, store, self.releases, locks, workers, self.upkeep, self.metrics, settings, clock, self._replays
        )
        self.questions = QuestionCalls(log, self.releases, finder, workers, settings, clock)
        self.shards = ShardCalls(log, store, locks, workers, self.upkeep)
        self.operator = ReleaseCalls(self.releases, store, workers, self._models, settings)
        log.writer.on_commit = self._on_commit
        self.metrics.watch(self)

    @property
    def served(self) -> Served:
        """The active release with its states."""
        return self.releases.active

    def unready(self) -> str | None:
        """Return why no requests should come here, or None."""
        if self.workers.draining:
            return "draining"
        if not self.log.writer.healthy:
            self.log.writer.probe()
            return "event log cannot be written"
        most = self.settings.unready_after_seconds
        unwritable = self.store.unwritable_seconds
        if unwritable and (self._probing is None or self._probing.done()):
            self._probing = self.workers.threads.submit(self.store.probe)
        if unwritable > most:
            return "cold store cannot be written"
        return "states lag behind the event log" if self.upkeep.lag_seconds > most else None

    async def told_metrics(self) -> bytes:
        """Return all metrics in Prometheus's text format; stores are asked in a thread, for a server may hang."""
        self.metrics.tiers = await self.workers.run(self.store.tiers)
        return self.metrics.text()

    async def close(self) -> None:
        """Let background work end, write what waits, close log and store."""
        await self.workers.finish()
        await asyncio.to_thread(self.log.close)
        await asyncio.to_thread(self.store.close)
        self.workers.close()

    def _prepare(self, release: Release) -> Served:
        """Return a release with what serves it."""
        settings = self.settings
        self._models.setdefault(release.state_fingerprint, release.model)
        steps, most = settings.rebuild_step_events, settings.inline_events
        states = UserStates(release, self.log, self.store, steps, most, self._replays)
        threads, batch = self.workers.threads, settings.batch_questions
        updates = Batcher(states.current_together, threads, batch)
        answers, long_answers = (Batcher(release.model.recommend, threads, batch, self._on_batch) for _ in range(2))
        return Served(release, states, updates, answers, long_answers, settings.long_history_events)

    def _on_commit(self, seconds: float, sync_seconds: float, num_calls: int) -> None:
        self.metrics.commit.observe(seconds)
        self.metrics.sync.observe(sync_seconds)
        self.metrics.commit_calls.observe(num_calls)

    def _on_batch(self, size: int, waited: float) -> None:
        self.metrics.batch_size.observe(size)
        self.metrics.batch_wait.observe(waited)
