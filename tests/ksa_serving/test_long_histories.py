"""No user takes the service from the others by what they send: events come at a rate, replays by a budget."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from test_app import assert_problem

from ksa_serving import buckets, workers
from ksa_serving.client import Client
from ksa_serving.errors import DeadlineError
from ksa_serving.event_log import EventLog
from ksa_serving.events import Owner
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.messages import EventMessage, EventsBatchRequest, EventsRequest, RecommendRequest, UserEvents
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import toy_release

pytestmark = pytest.mark.service
MakeService = Callable[..., Service]
HISTORY = 60
"""Events, of which the toy reads all again where the first changes."""


@pytest.fixture
def standing_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was taken flows in again, however long a test takes."""
    monkeypatch.setattr(buckets, "time", SimpleNamespace(monotonic=lambda: 0.0))


def events(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"item_id": f"item-{n % 50}", "timestamp": 1000 + n, "event_id": f"e{n}"} for n in range(first, first + count)
    ]


def post(client: httpx.Client, user: str, *sent: dict[str, Any]) -> httpx.Response:
    return client.post(f"/v1/users/{user}/events", json={"events": list(sent)})


@pytest.mark.usefixtures("standing_rates")
def test_a_user_for_whom_too_much_comes_is_told_when_to_come_back(make_service: MakeService, serve_in_thread: Any):
    service = make_service(settings=ServeSettings(user_events_per_second=0.1))  # five at once
    with serve_in_thread(service) as client:
        assert post(client, "ann", *events(0, 4)).status_code == 200
        assert post(client, "ann", *events(4, 3)).status_code == 200  # room for one is room for a call
        refused = post(client, "ann", *events(7, 1))
        assert_problem(refused, 429, "user-rate-limited")
        assert refused.headers["retry-after"] == "30"  # owes two, and one to come
        assert_problem(client.post("/v1/users/ann/events", content=b"never read"), 429, "user-rate-limited")
        batch = {"users": [{"user_id": "eve", "events": events(0, 1)}, {"user_id": "ann", "events": events(7, 1)}]}
        assert_problem(client.post("/v1/events:batch", json=batch), 429, "user-rate-limited")
        assert post(client, "bob", *events(0, 1)).status_code == 200
        assert client.post("/v1/users/ann/recommend", json={}).json()["num_events"] == 7
        assert service.log.head(Owner("eve")).num_events == 0
        assert b'ksa_refused_total{code="user-rate-limited"} 3.0' in service.metrics.text()


@pytest.mark.usefixtures("standing_rates")
def test_the_client_comes_back_when_it_is_told_to(make_service: MakeService, serve_in_thread: Any):
    service = make_service(settings=ServeSettings(user_events_per_second=0.4))
    rates = service.events._rates
    assert rates is not None
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        rates.owe(Owner("ann"), -1000)

    with serve_in_thread(service) as http, Client(str(http.base_url)) as client:
        client._sleep = sleep
        client.keep("ann", [EventMessage(f"item-{n}", n) for n in range(25)])  # five more than there was room for
        assert client.keep("ann", [EventMessage("item-1", 5000)]).results[0].status == "accepted"
    assert waits == [15.0]


async def keep(service: Service, *numbers: int) -> list[str]:
    sent = [EventMessage(f"item-{n % 50}", n) for n in numbers]
    return [result.status for result in (await service.events.post("ann", EventsRequest(sent))).results]


def long_service(folder: Path, catch_up_seconds: float = 3600) -> Service:
    """A service before whose user's history a late event costs `HISTORY` events, and whose users have 100, once."""
    settings = ServeSettings(inline_events=100, catch_up_seconds=catch_up_seconds, replay_events_per_second=1e-6)
    log = EventLog(folder, "arrival", late_horizon=100)
    return Service(toy_release(), log, MemoryStateStore(10**6), settings, clock=lambda: 1_700_000_000)


def test_late_events_beyond_their_users_budget_are_queued_and_done_after(tmp_path: Path):
    async def story() -> None:
        service = long_service(tmp_path, catch_up_seconds=0.01)
        states = service.served.states
        await keep(service, *range(1000, 1000 + HISTORY))
        assert not (await service.questions.recommend("ann", RecommendRequest())).degraded
        assert await keep(service, 900) == ["late-applied"]
        whole = await service.questions.recommend("ann", RecommendRequest())
        assert (whole.num_events, whole.degraded) == (HISTORY + 1, False)
        assert states.replays == {"late": 1}
        assert await keep(service, 901, 2000) == ["late-queued", "accepted"]  # 40 of 100 are left
        while states.replays["late"] < 2:  # though nobody asks
            await asyncio.sleep(0.01)
        while (await service.questions.recommend("ann", RecommendRequest())).degraded:
            await asyncio.sleep(0.01)
        assert (await service.questions.recommend("ann", RecommendRequest())).num_events == HISTORY + 3
        # What was read is owed: all that comes from here on waits, and is read again together.
        assert await keep(service, 902) == ["late-queued"]
        for n in range(903, 923):
            answer = await service.questions.recommend("ann", RecommendRequest())
            assert (answer.degraded, answer.num_events) == (True, HISTORY + 3)
            assert await keep(service, n) == ["late-queued"]
        assert states.replays == {"late": 2}
        service.upkeep._replays.owe(Owner("ann"), -1000)
        await service.close()

    asyncio.run(story())


def test_a_replay_rests_but_not_a_first_state_whose_user_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rests: list[float] = []
    monkeypatch.setattr(workers, "time", SimpleNamespace(sleep=rests.append))

    async def story() -> None:
        service = long_service(tmp_path)
        await keep(service, *range(1000, 1000 + HISTORY))
        service.upkeep.settle(Owner("ann"))
        while service.upkeep.num_settling:
            await asyncio.sleep(0.001)
        assert not rests
        await keep(service, 900)
        service.upkeep.settle(Owner("ann"))
        while service.upkeep.num_settling:
            await asyncio.sleep(0.001)
        assert rests
        assert service.served.states.replays == {"late": 1}
        await service.close()

    asyncio.run(story())


def test_a_state_that_knows_all_is_not_called_degraded_while_its_user_owes(tmp_path: Path):
    """Who is answered while a state is settled may have it settled again just after: that waits for what is owed."""

    async def story() -> None:
        service = long_service(tmp_path)
        await keep(service, *range(1000, 1000 + HISTORY))
        await service.questions.recommend("ann", RecommendRequest())
        service.upkeep._replays.owe(Owner("ann"), 1000)
        service.upkeep.settle(Owner("ann"))
        answer = await service.questions.recommend("ann", RecommendRequest())
        assert (answer.degraded, answer.num_events, answer.state_source) == (False, HISTORY, "host")
        assert await keep(service, 900) == ["late-queued"]
        answer = await service.questions.recommend("ann", RecommendRequest())
        assert (answer.degraded, answer.num_events) == (True, HISTORY)
        assert service.upkeep.is_settling(Owner("ann"))
        await service.close()

    asyncio.run(story())


def test_what_one_user_owes_no_other_waits_for(tmp_path: Path):
    async def story() -> None:
        service = long_service(tmp_path)
        service.upkeep._replays.owe(Owner("eve"), 1000)
        await keep(service, *range(1000, 1000 + HISTORY))
        await service.questions.recommend("ann", RecommendRequest())
        assert await keep(service, 900) == ["late-applied"]
        assert not (await service.questions.recommend("ann", RecommendRequest())).degraded
        await service.close()

    asyncio.run(story())


def test_a_deleted_user_waits_for_nothing_that_was_owed(tmp_path: Path):
    async def story() -> None:
        service = long_service(tmp_path)
        await keep(service, *range(1000, 1000 + HISTORY))
        await service.questions.recommend("ann", RecommendRequest())
        service.upkeep._replays.owe(Owner("ann"), 1000)
        assert await keep(service, 900) == ["late-queued"]
        assert (await service.questions.recommend("ann", RecommendRequest())).degraded
        assert service.upkeep.is_settling(Owner("ann"))
        await service.events.forget("ann")
        assert (await service.questions.recommend("ann", RecommendRequest())).state_source == "none"
        for n in range(3):
            assert await keep(service, n) == ["accepted"]
            answer = await service.questions.recommend("ann", RecommendRequest())
            assert (answer.degraded, answer.num_events) == (False, n + 1)
        await service.close()

    asyncio.run(story())


@pytest.mark.parametrize("change", ["retract", "correct"])
def test_corrections_and_retractions_cost_as_late_events_do(tmp_path: Path, change: str):
    async def story() -> None:
        service = long_service(tmp_path)
        sent = [EventMessage(f"item-{n % 50}", n, f"e{n}") for n in range(1000, 1000 + HISTORY)]
        await service.events.post("ann", EventsRequest(sent))
        degraded: list[bool] = []
        for n in range(1000, 1003):
            degraded.append((await service.questions.recommend("ann", RecommendRequest())).degraded)
            if change == "retract":
                await service.events.retract("ann", f"e{n}")
            else:
                await service.events.correct("ann", f"e{n}", EventMessage("item-99", n))
        degraded.append((await service.questions.recommend("ann", RecommendRequest())).degraded)
        assert degraded[:2] == [False, False]
        assert degraded[2:] == [True, True]
        await service.close()

    asyncio.run(story())


def test_a_batch_whose_time_ran_out_says_so_when_nothing_of_it_is_kept_any_more(make_service: MakeService):
    async def story() -> None:
        service = make_service()
        submit, calls = service.log.submit, 0

        def late_for_the_second(owner: Owner, *given: Any) -> Any:
            nonlocal calls
            calls += 1
            return submit(owner, given[0], 0.0 if calls == 2 else given[1])

        service.log.submit = late_for_the_second  # type: ignore[method-assign]
        users = [UserEvents(f"u{n}", [EventMessage("item-1", n)]) for n in range(4)]
        with pytest.raises(DeadlineError, match="passed"):
            await service.events.post_batch(EventsBatchRequest(users))
        assert [service.log.head(Owner(f"u{n}")).num_events for n in range(4)] == [1, 0, 1, 1]
        await service.close()

    asyncio.run(story())


def test_without_a_bound_all_that_comes_is_taken(make_service: MakeService):
    async def story() -> None:
        service = make_service(settings=ServeSettings(user_events_per_second=0))
        for start in range(0, 12_000, 1000):
            sent = [EventMessage("item-1", start + n) for n in range(1000)]
            await service.events.post("ann", EventsRequest(sent))
        assert service.log.head(Owner("ann")).num_events == 12_000
        await service.close()

    asyncio.run(story())
