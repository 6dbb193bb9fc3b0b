"""What a request tells of its user: answers are the library's, for that answer only; nonsense is refused by name."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksa_serving.attribution_reference import MaskedHistory
from ksa_serving.client import Client
from ksa_serving.errors import ClientError, InvalidRequestError
from ksa_serving.event_log import EventLog
from ksa_serving.events import Meeting, StoredEvent
from ksa_serving.library_model import LibraryModel
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.messages import EventMessage, RecommendRequest
from ksa_serving.models import ChunkReason
from ksa_serving.release import Release, load_release
from ksa_serving.service import Service
from recsys_ksa.cli import call_verb, main
from recsys_ksa.testing import lifelong_log, prepared_dataset, trained_run

AT = 1_700_000_000
HISTORY = [("i1", AT - 100), ("i2", AT - 50), ("i1", AT)]
USERS = {"user_id": ["u1", "u2"], "country": ["de", "fr"], "tags": [["a", "b"], []], "age": [20.0, 40.0]}
PREPARE = 'users.features = ["country"]\nusers.multi_features = ["tags"]\nusers.numbers = ["age"]\n'
MODEL = ["user_features=['country','tags','age']", "user_edges.age=[30]", "request_calendar=['hour']"]
NONSENSE = [
    ({"mood": 1}, r"expected features of the run \(country"),
    ({"age": "old"}, "expected a number"),
    ({"age": 10**400}, "within float64"),
    ({"tags": "a"}, "expected a list"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    pq.write_table(pa.table(USERS), folder / "users.parquet")
    told = ["--users", str(folder / "users.parquet")]
    data = prepared_dataset(folder, lifelong_log(2, 30, 50), arguments=told, config=PREPARE).path
    return trained_run(folder / "run", data, [f"model.{change}" for change in MODEL], steps=2)


@pytest.fixture(scope="module")
def release(run: Path) -> Release:
    return load_release(run)


@pytest.fixture(scope="module")
def library(release: Release) -> Any:
    return release.model.recommender  # type: ignore[attr-defined]


@pytest.fixture
def served(
    release: Release, tmp_path: Path, serve_in_thread: Callable[[Service], AbstractContextManager[httpx.Client]]
) -> Iterator[httpx.Client]:
    """A service that knows the history of ann."""
    service = Service(release, EventLog(tmp_path, release.tie), MemoryStateStore(10**6), clock=lambda: AT)
    with serve_in_thread(service) as http:
        with Client(str(http.base_url)) as client:
            client.keep("ann", [EventMessage(item, time) for item, time in HISTORY])
        yield http


def state_of(library: Any) -> Any:
    items, times = zip(*HISTORY)
    return library.append(library.new_state(), items, times)


EVENTS = [StoredEvent(n, item, time, None, None, None) for n, (item, time) in enumerate(HISTORY, start=1)]


def explained(library: Any, item: str, at: int, user: Any) -> list[ChunkReason]:
    model = LibraryModel(library)
    met = [Meeting(place, event.timestamp) for place, event in enumerate(EVENTS) if event.item_id == item]
    return model.explain(state_of(library), EVENTS[-model.num_newest :], met, item, at, 1, user)


def told_users(random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """What may be told of users: known, unknown, missing."""
    drawn: list[dict[str, Any]] = [
        {
            "country": [None, "de", "fr", "nowhere", 7][random.integers(5)],
            "tags": [None, [], ["b"], ["a", "b", "new"], ["b ", 3]][random.integers(5)],
            "age": [None, 3, 30, 30.5, int(random.integers(0, 90))][random.integers(5)],
        }
        for _ in range(count)
    ]
    return [{name: value for name, value in one.items() if random.random() < 0.8} for one in drawn]


def test_every_call_answers_as_the_library(served: httpx.Client, library: Any, rng: np.random.Generator) -> None:
    told, state = [{}, *told_users(rng, 12)], state_of(library)
    with Client(str(served.base_url)) as client:
        batch = client.recommend_batch(["ann"] * len(told), k=5, request_time=AT, users=told)
        for user, among_others in zip(told, batch.answers):
            wanted = library.recommend(state, 5, AT, user=user)
            items, scores = [item for item, _ in wanted], pytest.approx([score for _, score in wanted], rel=1e-5)
            alone = client.recommend("ann", k=5, request_time=AT, user=user)
            allowed = client.recommend("ann", k=5, request_time=AT, user=user, allow=items)
            for answer in (alone, among_others, allowed):
                assert [item.item_id for item in answer.items] == items
                assert [item.score for item in answer.items] == scores
            scored = client.score("ann", items, request_time=AT, user=user)
            assert [each.score for each in scored.scores] == scores
            why = client.explain("ann", items[0], request_time=AT, user=user)
            assert why.score == pytest.approx(wanted[0][1], rel=1e-5)
            (reason,) = explained(library, items[0], AT, user)
            assert why.chunks[0].score_change == pytest.approx(reason.score_change, rel=1e-4)
        (untold,) = client.recommend_batch(["ann"], k=5, request_time=AT).answers
        assert [item.item_id for item in untold.items] == [item.item_id for item in batch.answers[0].items]
    assert len({str(library.recommend(state, 5, AT, user=user)) for user in ({}, {"age": 3}, {"tags": ["a"]})}) == 3
    assert len({explained(library, "i9", AT, user)[0].score_change for user in ({}, {"age": 3})}) == 2


@pytest.mark.parametrize(("user", "said"), NONSENSE)
def test_what_the_run_does_not_read_is_a_problem_of_every_call(
    user: dict[str, Any], said: str, served: httpx.Client
) -> None:
    for body in (
        {"recommend": {"user": user}},
        {"recommend": {"user": user, "allow": ["i1"]}},
        {"score": {"item_ids": ["i1"], "user": user}},
        {"explain": {"item_id": "i1", "user": user}},
    ):
        ((call, asked),) = body.items()
        for name in ("ann", "nobody"):
            assert_refused(served.post(f"/v1/users/{name}/{call}", json=asked), said)
    users = [{}, user, {"age": 3}]
    assert_refused(served.post("/v1/recommend:batch", json={"user_ids": ["ann", "ben", "eve"], "users": users}), said)


def assert_refused(answer: httpx.Response, said: str) -> None:
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "invalid-user"
    assert re.search(said, answer.json()["detail"])


def test_a_batch_is_told_of_all_its_users_or_of_none(served: httpx.Client) -> None:
    with Client(str(served.base_url)) as client:
        with pytest.raises(ClientError, match=r"invalid-users.*each of 2 user_ids"):
            client.recommend_batch(["ann", "ben"], users=[{}])
        with pytest.raises(ClientError, match=r"Expected `object`, got `null`"):
            client.recommend_batch(["ann"], users=[None])


def test_a_question_told_nonsense_harms_nobody_beside_it(
    release: Release, make_service: Callable[..., Service]
) -> None:
    async def story() -> None:
        service = make_service(release)
        users: list[dict[str, Any]] = [{}, {"age": "old"}, {"age": 3}]
        asked = (service.questions.recommend("ann", RecommendRequest(user=each)) for each in users)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(answer, InvalidRequestError) for answer in answers] == [False, True, False]
        assert not any(isinstance(answer, Exception) for answer in answers[::2])

    asyncio.run(story())


def test_verbs_tell_of_users(
    served: httpx.Client, run: Path, library: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = tmp_path / "history.csv"
    history.write_text("item_id,timestamp\n" + "\n".join(f"{item},{time}" for item, time in HISTORY))
    user = {"country": "de", "tags": ["b"], "age": 31}
    wanted = [item for item, _ in library.recommend(state_of(library), 4, AT, user=user)]
    offline = [str(run), "--events", str(history)]
    online = ["--url", str(served.base_url), "--user", "ann"]
    asked = ["--k", "4", "--request-time", str(AT), "--user-features"]
    for where in (offline, online):
        capsys.readouterr()
        call_verb("recommend", [*where, *asked, json.dumps(user)])
        assert [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("   ")] == wanted
        for nonsense, said in (('{"mood": 1}', "expected features of the run"), ("[1]", "expected a JSON object")):
            assert main(["recommend", *where, *asked, nonsense]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert said in line


def test_explanations_know_the_time_of_the_request_and_its_user(library: Any, rng: np.random.Generator) -> None:
    for at, user in zip((AT, AT + 5 * 3_600), told_users(rng, 2)):
        plain = MaskedHistory(library, EVENTS, at, user)
        vector = library.item_vectors[library.run.items.index_of["i9"]]
        for reason in explained(library, "i9", at, user):
            without = plain.user_vector(reason.first // library.network.config.chunk_size, "last event")
            wanted = float((plain.user_vector() - without).numpy() @ vector)
            assert reason.score_change == pytest.approx(wanted + reason.own_item_change, abs=1e-4)
