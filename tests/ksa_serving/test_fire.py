"""Deletion under fire, and cancelled calls to a real Redis: nobody comes back, nobody gets another's answer."""

import asyncio
import contextlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ksa_serving.cold_store import EngineError
from ksa_serving.command import open_store
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.messages import EventMessage, EventsRequest, RecommendRequest
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.state_store import StateRecord
from ksa_serving.testing import toy_release

pytestmark = pytest.mark.service
NUM_CANCELLED = int(os.environ.get("KSA_CANCELLED", "1000"))
"""10^5 with `make nightly FULL=1`."""
NUM_DELETED = int(os.environ.get("KSA_DELETED", "60"))
"""10^4 with `make nightly FULL=1`."""
MakeService = Callable[..., Service]


def open_service(folder: Path, store: str, **told: Any) -> Service:
    folder.mkdir(exist_ok=True)
    release, settings = toy_release(), ServeSettings(state_bytes=3000, spill_events=4, cold_bytes=10**8, **told)
    log = EventLog(folder, "arrival")
    models = {release.state_fingerprint: release.model}
    opened = open_store(store, folder, models, log, settings)
    return Service(release, log, opened, settings, models=models)


def holds(folder: Path, what: bytes) -> bool:
    """Whether one of a service's files has these bytes; one that is gone by the time it is read has not."""
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if what in file.read_bytes():
                return True
    return False


def test_deleted_users_stay_deleted_while_everyone_reads_and_writes(tmp_path: Path, seed: int):
    draw = random.Random(seed)
    service = open_service(tmp_path, "lmdb")

    async def story() -> None:
        stop = asyncio.Event()

        async def others(name: str) -> None:
            n = 0
            while not stop.is_set():
                await service.events.post(name, EventsRequest([EventMessage(f"item-{n % 30}", 1000 + n, f"e{n}")]))
                await service.questions.recommend(name, RecommendRequest(k=1))
                n += 1

        async def doomed(name: str) -> None:
            events = [EventMessage(f"secret-{name}-{n}", 1000 + n, f"e{n}") for n in range(draw.randint(20, 60))]
            await service.events.post(name, EventsRequest(events))
            asking = [asyncio.create_task(service.questions.recommend(name, RecommendRequest(k=1))) for _ in range(4)]
            await asyncio.sleep(draw.random() * 0.01)
            await service.events.forget(name)
            answers = await asyncio.gather(*asking)
            assert {answer.num_events for answer in answers} <= {0, len(events)}
            assert (await service.questions.recommend(name, RecommendRequest(k=1))).num_events == 0

        crowd = [asyncio.create_task(others(f"u{n}")) for n in range(4)]
        for start in range(0, NUM_DELETED, 6):
            await asyncio.gather(*(doomed(f"d{n}") for n in range(start, start + 6)))
        stop.set()
        await asyncio.gather(*crowd)
        await service.close()

    asyncio.run(story())
    again = open_service(tmp_path, "lmdb")  # after a restart too, and not a byte is left
    while again.log.purging:
        pass
    assert again.store.purge()
    for n in range(NUM_DELETED):
        assert again.log.head(Owner(f"d{n}")).num_events == 0
    for file in tmp_path.iterdir():
        assert b"secret-" not in file.read_bytes(), file
    again.store.close()
    again.log.close()


@pytest.mark.parametrize("thread", ["model", "slow"])
def test_a_state_that_is_computed_while_its_user_is_deleted_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread: str
):
    inline = {"model": 1000, "slow": 10}[thread]  # for a question that waits for it, or in the background
    service = open_service(tmp_path, "lmdb", inline_events=inline, model_threads=2, purge_after_seconds=0.05)
    go_on, puts, put = threading.Event(), threading.Event(), service.store.put

    def put_late(record: StateRecord) -> None:
        if threading.current_thread().name.startswith((thread, "alone")):
            puts.set()
            go_on.wait(120)
        put(record)

    monkeypatch.setattr(service.store, "put", put_late)

    async def story() -> None:
        await service.events.post("ann", EventsRequest([EventMessage(f"secret-{n}", n) for n in range(60)]))
        asked = asyncio.create_task(service.questions.recommend("ann", RecommendRequest(k=1)))
        assert await asyncio.to_thread(puts.wait, 120)
        forgetting = asyncio.create_task(service.events.forget("ann"))
        await asyncio.wait([forgetting], timeout=0.2)
        go_on.set()
        await asyncio.gather(asked, forgetting)
        while service.upkeep.num_settling:
            await asyncio.sleep(0.01)
        assert service.store.memory.records() == []  # type: ignore[attr-defined]
        assert len(service.store.cold) == 0  # type: ignore[attr-defined]
        while holds(tmp_path, b"secret-"):
            await asyncio.sleep(0.05)
        await service.close()

    asyncio.run(asyncio.wait_for(story(), 300))


@pytest.mark.parametrize("kind", ["lmdb", "redis"])
@pytest.mark.parametrize("crashes", ["before the store knew", "while the store failed"])
def test_a_crash_while_a_user_is_deleted_leaves_nothing_in_the_cold_store(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    kind: str,
    crashes: str,
    monkeypatch: pytest.MonkeyPatch,
    serve_in_thread: Any,
):
    store = request.getfixturevalue("patient_redis") if kind == "redis" else kind
    service = open_service(tmp_path, store)
    cold: Any = service.store.cold  # type: ignore[attr-defined]
    before = len(cold)
    for user in ("ann", "bob"):
        service.log.append(Owner(user), [NewEvent(f"secret-{user}-{n}", n) for n in range(60)])
        service.served.states.current(Owner(user))
    assert len(cold) == before + 2
    if crashes == "before the store knew":
        service.log.forget(Owner("ann")).result()
    else:

        def failing(prefix: bytes) -> None:
            raise EngineError("it is being compacted")

        monkeypatch.setattr(cold._engine, "remove", failing)
        asyncio.run(service.events.forget("ann"))
    service.log.close()  # as a crash leaves them: nothing was dropped, nothing is flushed
    cold._engine.close()
    again = open_service(tmp_path, store, purge_after_seconds=0.01)
    cold = again.store.cold  # type: ignore[attr-defined]
    with serve_in_thread(again):  # a service that starts sees to it
        deadline = time.monotonic() + 300
        while (again.log.purging or len(cold) > before + 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        parts = [part for key in cold._engine.record_keys() for part in cold._engine.read(key).values()]
        assert len(cold) == before + 1
        assert any(b"secret-bob" in part for part in parts)
        assert not any(b"secret-ann" in part for part in parts)
        again.store.drop(Owner("bob"))
    for file in tmp_path.iterdir():
        assert b"secret-ann" not in file.read_bytes(), file


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed: packaging/system.sh")
def test_cancelled_questions_never_give_one_user_anothers_answer(tmp_path: Path, patient_redis: str, seed: int):
    draw = random.Random(seed)
    service = open_service(tmp_path, patient_redis)
    users = [f"u{n}" for n in range(20)]
    for number, user in enumerate(users):  # each user's items are its own, and so is its number of events
        service.log.append(Owner(user), [NewEvent(f"{user}-{n}", n) for n in range(40 + number)])
        service.served.states.current(Owner(user))

    async def story() -> None:
        cancelled = answered = 0
        while cancelled < NUM_CANCELLED:
            asked = [(user, draw.random() < 0.8) for user in draw.choices(users, k=16)]
            tasks = [asyncio.create_task(service.questions.recommend(user, RecommendRequest(k=1))) for user, _ in asked]
            for task, (_, cancel) in zip(tasks, asked):
                if cancel:
                    await asyncio.sleep(0 if draw.random() < 0.5 else draw.random() * 0.001)
                    task.cancel()
            for (user, _), answer in zip(asked, await asyncio.gather(*tasks, return_exceptions=True)):
                if isinstance(answer, BaseException):
                    assert isinstance(answer, asyncio.CancelledError), answer
                    cancelled += 1
                else:
                    assert answer.num_events == 40 + int(user[1:])
                    answered += 1
        assert answered
        assert service.store.hits["cold"] > 0  # type: ignore[attr-defined]
        assert service.store.misses["owner"] == 0
        for user in users:
            record, _ = service.served.states.current(Owner(user))
            assert record.state.seen == {f"{user}-{n}" for n in range(40 + int(user[1:]))}
        await service.close()

    asyncio.run(story())


def test_the_service_answers_while_redis_is_away(tmp_path: Path):
    service = open_service(tmp_path, "redis://127.0.0.1:1/0")

    async def story() -> None:
        for n in range(40):
            await service.events.post("ann", EventsRequest([EventMessage(f"item-{n}", n)]))
            answer: Any = await service.questions.recommend("ann", RecommendRequest(k=1))
            assert answer.num_events == n + 1
        await service.events.forget("ann")
        service.workers.draining = True  # the deletion is still owed to the server; closing does not wait for it
        await service.close()

    asyncio.run(story())
