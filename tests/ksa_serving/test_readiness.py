"""`/readyz` says no where requests should not come: and yes again once what failed works, without a restart."""

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lmdb
import pytest
import redis
from simulated import SimulatedEngine

from ksa_serving.cold_store import BytesEngine, ColdStateStore, EngineError
from ksa_serving.event_log import EventLog
from ksa_serving.events import Owner
from ksa_serving.lmdb_engine import LmdbEngine
from ksa_serving.messages import EventMessage, EventsRequest, RecommendRequest
from ksa_serving.redis_engine import RedisEngine
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import toy_release
from ksa_serving.tiered_store import TieredStateStore

pytestmark = pytest.mark.service
UNWRITABLE, BEHIND = "cold store cannot be written", "states lag behind the event log"


def service_with(engine: BytesEngine, folder: Path, unready_after_seconds: float) -> Service:
    release = toy_release()
    models = {release.state_fingerprint: release.model}
    log = EventLog(folder, release.tie)
    store = TieredStateStore(10**6, ColdStateStore(engine, models, log.salt), lambda n: True, spill_events=1)
    settings = ServeSettings(unready_after_seconds=unready_after_seconds, catch_up_seconds=0)
    return Service(release, log, store, settings, clock=lambda: 1_700_000_000, models=models)


async def live(service: Service, number: int) -> None:
    """Keep an event and ask, so that a state is written to the cold store."""
    await service.events.post("ann", EventsRequest([EventMessage("item-1", number)]))
    await service.questions.recommend("ann", RecommendRequest())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not true():
            await asyncio.sleep(0.005)


def test_a_cold_store_that_cannot_be_written_is_told_until_it_can(tmp_path: Path, seed: int):
    async def story() -> None:
        engine = SimulatedEngine(random.Random(seed))
        service = service_with(engine, tmp_path, 0.05)
        await live(service, 1)
        await until(lambda: service.unready() is None)  # its state has followed
        engine.fault_share = 1.0
        await live(service, 2)
        await until(lambda: service.unready() == UNWRITABLE)
        assert b"ksa_ready 0.0" in service.metrics.text()
        assert (await service.questions.recommend("ann", RecommendRequest())).num_events == 2  # all goes on
        await asyncio.sleep(0.1)
        assert service.unready() == UNWRITABLE
        engine.fault_share = 0.0
        await until(lambda: service.unready() is None)  # asking tries it again
        await service.close()

    asyncio.run(story())


def test_a_failure_within_the_setting_is_not_told(tmp_path: Path, seed: int):
    async def story() -> None:
        engine = SimulatedEngine(random.Random(seed))
        service = service_with(engine, tmp_path, 3600)
        engine.fault_share = 1.0
        await live(service, 1)
        assert service.store.unwritable_seconds > 0
        assert service.unready() is None
        probing = service._probing
        assert probing is not None
        await until(probing.done)  # asking tried it
        engine.fault_share = 0.0
        await live(service, 2)
        assert service.store.unwritable_seconds == 0  # a write that succeeds tells it too
        await service.close()

    asyncio.run(story())


def test_states_that_lag_are_told_until_they_follow(tmp_path: Path, seed: int):
    async def story() -> None:
        service = service_with(SimulatedEngine(random.Random(seed)), tmp_path, 0.05)
        assert service.upkeep.lag_seconds == 0
        go_on, current_together = threading.Event(), service.served.states.current_together

        def held(owners: Sequence[Owner]) -> Any:
            assert go_on.wait(300)
            return current_together(owners)

        service.served.states.current_together = held  # type: ignore[method-assign]
        for number in range(3):
            await service.events.post("ann", EventsRequest([EventMessage("item-1", number)]))
            assert service.upkeep.lag_seconds < 30
        await until(lambda: service.unready() == BEHIND)
        go_on.set()
        await until(lambda: service.unready() is None)
        await service.close()

    asyncio.run(story())


def test_a_probe_writes_and_leaves_nothing(tmp_path: Path, redis_url: str):
    engine = LmdbEngine(tmp_path, 10**7)
    engine.write(b"k" * 24, {b"": b"head"}, ())
    transactions = engine._env.info()["last_txnid"]
    engine.probe()
    assert engine._env.info()["last_txnid"] == transactions + 1
    assert engine.num_records() == 1
    assert list(engine.record_keys()) == [b"k" * 24]
    assert not engine.needs_compaction
    engine._env.close()
    engine._env = lmdb.open(str(tmp_path / "cold.lmdb"), subdir=False, max_dbs=2, readonly=True)
    engine._written = engine._env.open_db(b"written", create=False)
    with pytest.raises(EngineError):
        engine.probe()
    engine._env.close()
    server = redis.Redis.from_url(redis_url)
    networked = RedisEngine(redis_url)
    networked.probe()
    server.config_set("maxmemory", 1)
    with pytest.raises(EngineError):
        networked.probe()
    server.config_set("maxmemory", 0)
    assert not list(server.scan_iter(b"ksa:user:*"))
    networked.close()
