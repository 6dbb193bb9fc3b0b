"""A real Redis behind a proxy that cuts, hangs and mixes up: answers come from the log, and are each user's own."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from faulty_proxy import FaultyProxy, Mode, faulty_proxy

from ksa_serving.command import open_store
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.messages import RecommendAnswer, RecommendRequest, ScoredItem
from ksa_serving.models import Question
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import toy_release

pytestmark = pytest.mark.service
NUM_CANCELLED = int(os.environ.get("KSA_CANCELLED", "1000"))
"""10^5 with `make nightly FULL=1`."""
FAULTS: tuple[Mode, ...] = tuple(mode for mode in get_args(Mode) if mode != "pass")
CLOSING: tuple[Mode, ...] = ("refuse", "cut", "reset", "hang", "trickle")
"""Faults after which a server is not asked for a while."""
USERS = [f"u{number}" for number in range(8)]
ASKED = RecommendRequest(k=3, request_time=None)


@pytest.fixture
def proxy(redis_url: str, seed: int) -> Iterator[FaultyProxy]:
    with faulty_proxy(int(redis_url.rsplit(":", 1)[1].split("/")[0]), seed) as proxy:
        yield proxy


@pytest.fixture
def service(proxy: FaultyProxy, tmp_path: Path) -> Service:
    """A service with room for few states in memory; every user has items, and a number of events, of their own."""
    release, settings = toy_release(), ServeSettings(state_bytes=3000, spill_events=4)
    log = EventLog(tmp_path, "arrival")
    models = {release.state_fingerprint: release.model}
    store = open_store(f"redis://127.0.0.1:{proxy.port}/0", tmp_path, models, log, settings)
    service = Service(release, log, store, settings, models=models)
    for number, user in enumerate(USERS):
        log.append(Owner(user), [NewEvent(f"{user}-{n}", n) for n in range(40 + number)])
    return service


def expected(service: Service) -> dict[str, list[ScoredItem]]:
    """What each user is to be answered, from the log alone."""
    model = service.served.release.model
    states = {user: model.append(model.new_state(), service.log.read(Owner(user))[1]) for user in USERS}
    questions = [Question(states[user], k=3, request_time=None) for user in USERS]
    return {
        user: [ScoredItem(item, float(score)) for item, score in scored]
        for user, scored in zip(USERS, model.recommend(questions))
    }


async def ask_everyone(service: Service, truth: dict[str, list[ScoredItem]], draw: random.Random) -> Counter[str]:
    """Ask of all users at once; return where the states came from."""
    users = draw.sample(USERS, len(USERS))
    answers = await asyncio.gather(*(service.questions.recommend(user, ASKED) for user in users))
    for user, answer in zip(users, answers):
        check(user, answer, truth)
    return Counter(answer.state_source for answer in answers)


async def until_the_store_answers(service: Service, truth: dict[str, list[ScoredItem]], draw: random.Random) -> None:
    """Ask until states come from the cold store: at once, but where a busy machine made it wait for Redis too long."""
    give_up = time.monotonic() + 120
    while not ((await ask_everyone(service, truth, draw))["store"] and service.store.is_available):
        assert time.monotonic() < give_up
        await asyncio.sleep(0.1)


def check(user: str, answer: RecommendAnswer, truth: dict[str, list[ScoredItem]]) -> None:
    assert answer.items == truth[user], user
    assert answer.num_events == 40 + int(user[1:])


@pytest.mark.parametrize("mode", FAULTS)
def test_answers_come_from_the_log_while_redis_fails_and_from_redis_once_it_is_back(
    service: Service, proxy: FaultyProxy, seed: int, mode: Mode
):
    draw = random.Random(seed)
    truth = expected(service)

    async def story() -> None:
        await until_the_store_answers(service, truth, draw)  # memory is too small for all
        proxy.set(mode)
        began, opened = time.monotonic(), None
        for _ in range(4):
            await ask_everyone(service, truth, draw)
            if opened is None and not service.store.is_available:
                opened = time.monotonic() - began
        if mode in CLOSING:
            assert opened is not None
            print(f"{mode}: all answered, and the circuit open, after {opened:.2f} s")
            began = time.monotonic()
            sources = await ask_everyone(service, truth, draw)
            print(f"then all in {time.monotonic() - began:.3f} s, {dict(sources)}")
            assert b"ksa_cold_store_available 0.0" in service.metrics.text()
        assert proxy.done or mode == "refuse"
        proxy.set("pass")
        await until_the_store_answers(service, truth, draw)
        assert b"ksa_cold_store_available 1.0" in service.metrics.text()
        await service.close()

    asyncio.run(story())


def test_calls_cancelled_while_redis_fails_never_give_one_user_anothers_answer(
    service: Service, proxy: FaultyProxy, seed: int
):
    draw = random.Random(seed)
    truth = expected(service)

    async def story() -> None:
        await ask_everyone(service, truth, draw)
        cancelled, met = 0, Counter[str]()
        while cancelled < NUM_CANCELLED:
            if draw.random() < 0.05:
                mode: Mode = draw.choice(["pass", "pass", *FAULTS])
                proxy.set(mode, 1.0 if mode == "refuse" else draw.random())
            users = draw.choices(USERS, k=16)
            tasks = [asyncio.create_task(service.questions.recommend(user, ASKED)) for user in users]
            for task in tasks:
                if draw.random() < 0.8:
                    await asyncio.sleep(0 if draw.random() < 0.5 else draw.random() * 0.002)
                    task.cancel()
            for user, answer in zip(users, await asyncio.gather(*tasks, return_exceptions=True)):
                if isinstance(answer, asyncio.CancelledError):
                    cancelled += 1
                else:
                    assert isinstance(answer, RecommendAnswer), answer
                    check(user, answer, truth)
                    met[answer.state_source] += 1
        print(cancelled, "cancelled; answered from", dict(met), "; misses", dict(service.store.misses))
        assert met
        proxy.set("pass")
        await asyncio.sleep(1.1)
        for _ in range(3):
            await ask_everyone(service, truth, draw)
        await service.close()

    asyncio.run(story())
