"""What a request tells of its user: answers are the library's, for that answer only; nonsense is refused by name."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksa_serving.attribution import base_score
from ksa_serving.errors import InvalidRequestError
from ksa_serving.messages import EventMessage, EventsRequest, RecommendRequest, ScoreRequest
from ksa_serving.release import Release, load_release
from ksa_serving.service import Service
from recsys_ksa.cli import call_verb
from recsys_ksa.testing import lifelong_log, prepared_dataset

AT = 1_700_000_000
USERS = {"user_id": ["u1", "u2"], "country": ["de", "fr"], "tags": [["a", "b"], []], "age": [20.0, 40.0]}
PREPARE = 'users.features = ["country"]\nusers.multi_features = ["tags"]\nusers.numbers = ["age"]\n'
MODEL = ["user_features=['country','tags','age']", "user_edges.age=[30]", "request_calendar=['hour']"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("told")
    pq.write_table(pa.table(USERS), folder / "users.parquet")
    told = ["--users", str(folder / "users.parquet")]
    data = prepared_dataset(folder, lifelong_log(2, 30, 50), arguments=told, config=PREPARE).path
    config = str(Path(__file__).resolve().parents[2] / "configs" / "smoke.toml")
    sets = [word for change in MODEL for word in ("--set", f"model.{change}")]
    call_verb("train", [config, "--data", str(data), "--out", str(folder / "run"), "--steps", "2", *sets])
    return load_release(folder / "run")


def test_answers_are_those_of_the_library(release: Release, make_service: Callable[..., Service]) -> None:
    library: Any = release.model.recommender  # type: ignore[attr-defined]
    told = [{}, {"country": "de", "age": 31}, {"country": "nowhere", "tags": ["b"], "age": None}]
    times = [AT - 100, AT - 50, AT]
    state = library.append(library.new_state(), ["i1", "i2", "i1"], times)
    expected = [library.recommend(state, 5, AT, user=user) for user in told]
    assert len({str(answer) for answer in expected}) == 3

    async def story() -> None:
        service = make_service(release)
        events = [EventMessage(item, time) for item, time in zip(["i1", "i2", "i1"], times)]
        await service.events.post("ann", EventsRequest(events))
        requests = [msgspec.convert({"k": 5, "request_time": AT, "user": user}, RecommendRequest) for user in told]
        found = await asyncio.gather(*(service.questions.recommend("ann", request) for request in requests))
        for answer, wanted in zip(found, expected):
            assert [item.item_id for item in answer.items] == [item for item, _ in wanted]
            assert [item.score for item in answer.items] == pytest.approx([score for _, score in wanted], rel=1e-5)
            items = [item for item, _ in wanted]
            user: Any = told[found.index(answer)]
            scored = await service.questions.score("ann", ScoreRequest(items, AT, user=user))
            assert [each.score for each in scored.scores] == pytest.approx([score for _, score in wanted], rel=1e-5)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("user", "said"), [({"mood": 1}, r"expected features of the run \(country"), ({"age": "old"}, "expected a number")]
)
def test_what_the_run_does_not_read_is_refused_and_nobody_beside_it(
    user: dict[str, Any], said: str, release: Release, make_service: Callable[..., Service]
) -> None:
    async def story() -> None:
        service = make_service(release)
        with pytest.raises(InvalidRequestError, match=said):
            await service.questions.score("ann", ScoreRequest(["i1"], AT, user=user))
        users: list[dict[str, Any]] = [{}, user, {"age": 3}]
        asked = (service.questions.recommend("ann", RecommendRequest(user=each)) for each in users)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(answer, InvalidRequestError) for answer in answers] == [False, True, False]
        assert not any(isinstance(answer, Exception) for answer in answers[::2])

    asyncio.run(story())


def test_explanations_know_the_time_of_the_request(release: Release) -> None:
    library: Any = release.model.recommender  # type: ignore[attr-defined]
    state = library.append(library.new_state(), ["i1", "i2"], [AT - 100, AT])
    for at in (AT, AT + 5 * 3_600):
        (wanted,) = library.score(state, ["i9"], at)
        assert base_score(library, state, "i9", at) == pytest.approx(wanted, rel=1e-4)
