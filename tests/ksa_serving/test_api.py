"""The calls beyond events and recommend, over real HTTP."""

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from ksa_serving import buckets
from ksa_serving.auth import Tokens
from ksa_serving.client import Client
from ksa_serving.errors import ClientError
from ksa_serving.events import Owner
from ksa_serving.load import Plan, report, run_plan
from ksa_serving.messages import EventMessage
from ksa_serving.service import Service
from ksa_serving.settings import Limits, ServeSettings
from ksa_serving.testing import ToyModel
from recsys_ksa.cli import main
from recsys_ksa.errors import UsageError

pytestmark = pytest.mark.service
MakeService = Callable[..., Service]


def event(n: int, **fields: Any) -> dict[str, Any]:
    return {"item_id": f"item-{n % 50}", "timestamp": 1000 + n, "event_id": f"e{n}", **fields}


def keep(client: httpx.Client, user: str, *events: dict[str, Any]) -> dict[str, Any]:
    return client.post(f"/v1/users/{user}/events", json={"events": list(events)}).raise_for_status().json()


def ask(client: httpx.Client, user: str, verb: str = "recommend", **fields: Any) -> httpx.Response:
    return client.post(f"/v1/users/{user}/{verb}", json=fields)


def assert_problem(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"


def test_scores_are_those_of_the_answer_and_unknown_items_have_none(client: httpx.Client):
    keep(client, "ann", *(event(n) for n in range(9)))
    items = ask(client, "ann", k=5, request_time=2000).json()["items"]
    asked = [*(item["item_id"] for item in items), "nope"]
    answer = ask(client, "ann", "score", item_ids=asked, request_time=2000).json()
    assert answer["scores"] == [*items, {"item_id": "nope", "score": None}]
    assert answer["model_version"] == "toy-model"


def test_an_explanation_names_chunks_dates_and_events(client: httpx.Client):
    keep(client, "ann", *(event(n) for n in range(30)))
    answer = ask(client, "ann", "explain", item_id="item-7", chunks=3).json()
    assert len(answer["chunks"]) == 3
    first = answer["chunks"][0]
    assert [e["index"] for e in first["events"]] == list(range(4 * first["chunk"], 4 * first["chunk"] + 4))
    assert first["first_time"] == first["events"][0]["timestamp"]
    assert first["events"][0]["title"] == f"Item {first['events'][0]['item_id'].removeprefix('item-')}"
    assert 0 < answer["summary_attention"] < 1
    assert_problem(ask(client, "ann", "explain", item_id="nope"), 400, "unknown-item")
    assert_problem(ask(client, "ann", "explain", item_id="item-7", chunks=65), 400, "invalid-chunks")
    assert ask(client, "eve", "explain", item_id="item-7").json()["chunks"] == []


def test_a_history_is_told_in_order_and_by_pages(client: httpx.Client):
    keep(client, "ann", *(event(n) for n in reversed(range(30))))
    whole = client.get("/v1/users/ann/events").json()
    assert [e["event_id"] for e in whole["events"]] == [f"e{n}" for n in range(30)]
    assert [e["chunk"] for e in whole["events"]] == [n // 4 for n in range(30)]
    page = client.get("/v1/users/ann/events?limit=5&before=12").json()
    assert [e["index"] for e in page["events"]] == [7, 8, 9, 10, 11]
    assert client.get("/v1/users/eve/events").json()["events"] == []
    assert_problem(client.get("/v1/users/ann/events?limit=x"), 400, "invalid-limit")
    assert_problem(client.get("/v1/users/ann/events?limit=10001"), 400, "invalid-limit")


def test_correcting_and_retracting_over_http(client: httpx.Client):
    keep(client, "ann", *(event(n) for n in range(20)))
    ask(client, "ann")
    path = "/v1/users/ann/events/e3"
    assert client.put(path, json={"item_id": "item-9", "timestamp": 1003}).json()["results"][0]["status"] != "rejected"
    assert client.put(path, json={"item_id": "item-9", "timestamp": 1003}).json()["results"][0]["status"] == "duplicate"
    kept = {e["event_id"]: e["item_id"] for e in client.get("/v1/users/ann/events").json()["events"]}
    assert kept["e3"] == "item-9"
    assert client.delete("/v1/users/ann/events/e5").json()["results"][0]["status"] == "accepted"
    assert client.delete("/v1/users/ann/events/e5").json()["results"][0]["status"] == "duplicate"
    assert_problem(client.delete("/v1/users/ann/events/nope"), 404, "unknown-event")
    assert_problem(client.put(path, json={"item_id": "a", "timestamp": 1, "event_id": "e4"}), 400, "contradiction")
    answer = ask(client, "ann").json()
    assert (answer["num_events"], answer["state_source"]) == (19, "host")


def test_a_deleted_user_is_new_again(client: httpx.Client):
    before = ask(client, "ann", k=5, request_time=5000).json()["items"]
    keep(client, "ann", *(event(n) for n in range(100)))
    assert ask(client, "ann", k=5, request_time=5000).json()["items"] != before
    receipt = client.delete("/v1/users/ann").json()
    assert (receipt["num_events"], receipt["purged_within_seconds"]) == (100, 60)
    again = ask(client, "ann", k=5, request_time=5000).json()
    assert (again["num_events"], again["items"]) == (0, before)
    assert keep(client, "ann", event(1))["results"][0]["status"] == "accepted"
    assert client.delete("/v1/users/nobody").json()["num_events"] == 0


def test_batches_answer_as_single_calls_do(client: httpx.Client):
    users = [{"user_id": f"u{n}", "events": [event(m) for m in range(n)]} for n in range(8)]
    answers = client.post("/v1/events:batch", json={"users": users}).json()["answers"]
    assert [len(answer["results"]) for answer in answers] == list(range(8))
    ids = [f"u{n}" for n in range(8)]
    together = client.post("/v1/recommend:batch", json={"user_ids": ids, "k": 4, "request_time": 9}).json()["answers"]
    for user, answer in zip(ids, together):
        assert answer["items"] == ask(client, user, k=4, request_time=9).json()["items"]
    assert_problem(
        client.post("/v1/recommend:batch", json={"user_ids": [f"u{n}" for n in range(257)]}), 400, "too-many-users"
    )
    assert client.post("/v1/recommend:batch", json={"user_ids": [f"u{n}" for n in range(256)]}).status_code == 200
    bad = [*users, {"user_id": "", "events": [event(1)]}]
    assert_problem(client.post("/v1/events:batch", json={"users": bad}), 400, "invalid-user-id")


def test_allow_and_deny_lists(client: httpx.Client):
    keep(client, "ann", event(1))
    allowed = [f"item-{n}" for n in range(20)]
    answer = ask(client, "ann", k=50, allow=allowed, deny=["item-3"]).json()
    assert {item["item_id"] for item in answer["items"]} == set(allowed) - {"item-3"}
    assert len(ask(client, "ann", k=1000, deny=allowed).json()["items"]) == 180
    assert_problem(ask(client, "ann", deny=["a"] * 4097), 400, "too-many-items")
    assert ask(client, "ann", deny=["a"] * 4096).status_code == 200


def test_min_seq_waits_for_what_was_kept_and_tells_when_it_did_not_come(client: httpx.Client):
    seq = keep(client, "ann", event(1))["seq"]
    assert ask(client, "ann", min_seq=seq).json()["stale"] is False
    answer = client.post("/v1/users/ann/recommend", json={"min_seq": seq + 1}, headers={"x-deadline-ms": "100"}).json()
    assert (answer["stale"], answer["state_seq"]) == (True, seq)


def test_deadlines_drop_work_before_it_begins(make_service: MakeService, serve_in_thread: Any):
    service = make_service()
    current = service.served.states.current
    service.served.states.current = lambda *a: time.sleep(0.3) or current(*a)  # type: ignore[method-assign]
    with serve_in_thread(service) as client:
        late = client.post("/v1/users/ann/recommend", json={}, headers={"x-deadline-ms": "50"})
        assert_problem(late, 504, "deadline-exceeded")
        for value in ("0", "-1", "soon", "600001"):
            refused = client.post("/v1/users/ann/recommend", json={}, headers={"x-deadline-ms": value})
            assert_problem(refused, 400, "invalid-deadline")
        assert client.post("/v1/users/ann/recommend", json={}, headers={"x-deadline-ms": "600000"}).status_code == 200


def test_long_work_is_answered_degraded_and_done_after(make_service: MakeService, serve_in_thread: Any):
    service = make_service(settings=ServeSettings(inline_events=100))
    with serve_in_thread(service) as client:
        keep(client, "ann", *(event(n) for n in range(500)))
        first = ask(client, "ann").json()
        assert (first["degraded"], first["state_source"]) == (True, "degraded")
        until = time.monotonic() + 120
        while (answer := ask(client, "ann").json())["degraded"]:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert answer["num_events"] == 500


def write_tokens(path: Path, **scopes: list[str]) -> Path:
    lines = []
    for name, allowed in scopes.items():
        digest = hashlib.sha256(name.encode()).hexdigest()
        lines.append(f'[[token]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = {allowed}\ntenant = "{name[0]}"\n')
    path.write_text("\n".join(lines).replace("'", '"'))
    return path


def test_tokens_open_what_their_scopes_say(make_service: MakeService, serve_in_thread: Any, tmp_path: Path):
    every = ["read", "inspect", "ingest", "delete"]
    path = write_tokens(
        tmp_path / "tokens.toml",
        a_read=["read"],
        a_inspect=["inspect"],
        a_ingest=["ingest"],
        a_delete=["delete"],
        b_all=every,
    )
    with serve_in_thread(make_service(), tokens=Tokens(path)) as client:
        assert_problem(ask(client, "ann"), 401, "unauthorized")
        assert client.get("/livez").status_code == 200
        assert client.get("/metrics").status_code == 401

        def as_(name: str, method: str, path: str, **rest: Any) -> httpx.Response:
            return client.request(method, path, headers={"authorization": f"Bearer {name}"}, **rest)

        assert_problem(as_("wrong", "POST", "/v1/users/ann/recommend", json={}), 401, "unauthorized")
        calls: list[tuple[str, str, str, Any]] = [
            ("ingest", "POST", "/v1/users/ann/events", {"events": [event(1)]}),
            ("ingest", "POST", "/v1/events:batch", {"users": [{"user_id": "ann", "events": [event(2)]}]}),
            ("ingest", "PUT", "/v1/users/ann/events/e1", event(1)),
            ("read", "POST", "/v1/users/ann/recommend", {}),
            ("read", "POST", "/v1/recommend:batch", {"user_ids": ["ann"]}),
            ("read", "POST", "/v1/users/ann/score", {"item_ids": ["item-1"]}),
            ("read", "GET", "/v1/items?text=item", None),
            ("inspect", "POST", "/v1/users/ann/explain", {"item_id": "item-1"}),
            ("inspect", "GET", "/v1/users/ann/events", None),
            ("inspect", "GET", "/v1/users/ann/state", None),
            ("delete", "DELETE", "/v1/users/ann/events/e1", None),
            ("delete", "DELETE", "/v1/users/ann", None),
        ]
        for needed, method, path_, body in calls:
            for scope in every:
                answer = as_(f"a_{scope}", method, path_, json=body)
                if scope == needed:
                    assert answer.status_code == 200, (scope, method, path_, answer.text)
                else:
                    assert_problem(answer, 403, "forbidden")
        as_("a_ingest", "POST", "/v1/users/ann/events", json={"events": [event(1)]})
        assert as_("a_inspect", "GET", "/v1/users/ann/state").json()["num_events"] == 1
        assert as_("b_all", "GET", "/v1/users/ann/state").json()["num_events"] == 0  # another tenant's ann
        assert as_("b_all", "DELETE", "/v1/users/ann").json()["num_events"] == 0
        assert as_("a_inspect", "GET", "/v1/users/ann/state").json()["num_events"] == 1


def test_where_a_state_came_from_is_told_to_who_may_inspect(
    make_service: MakeService, serve_in_thread: Any, tmp_path: Path
):
    path = write_tokens(tmp_path / "tokens.toml", reads=["read"], really=["read", "inspect"])
    with serve_in_thread(make_service(), tokens=Tokens(path)) as client:
        for token, told in (("reads", None), ("really", "none")):
            headers = {"authorization": f"Bearer {token}"}
            answer = client.post("/v1/users/ann/recommend", json={}, headers=headers).json()
            assert answer["state_source"] == told
            answers = client.post("/v1/recommend:batch", json={"user_ids": ["ann"]}, headers=headers).json()["answers"]
            assert answers[0]["state_source"] == told
            score = client.post("/v1/users/ann/score", json={"item_ids": []}, headers=headers).json()
            assert score["state_source"] == told


def test_a_changed_token_file_takes_effect_and_a_broken_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_tokens(tmp_path / "tokens.toml", one=["read"])
    tokens = Tokens(path)
    assert tokens.caller("Bearer one") is not None
    assert tokens.caller("Basic one") is None
    assert tokens.caller(None) is None
    write_tokens(path, second=["read"])
    tokens._checked -= 10
    assert tokens.caller("Bearer one") is None
    assert tokens.caller("Bearer second") is not None
    path.write_text("nonsense")
    tokens._checked -= 10
    assert tokens.caller("Bearer second") is not None
    with pytest.raises(UsageError, match="expected a TOML file"):
        Tokens(path)


def test_a_client_that_asks_too_often_is_told_to_slow_down(
    make_service: MakeService, serve_in_thread: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(buckets, "time", SimpleNamespace(monotonic=lambda: 0.0))  # nothing flows in meanwhile
    with serve_in_thread(make_service(settings=ServeSettings(requests_per_second=2))) as client:
        answers = [ask(client, "ann") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 4 + [429]
        assert_problem(answers[-1], 429, "rate-limited")
        assert answers[-1].headers["retry-after"] == "1"
        assert client.get("/livez").status_code == 200


def test_admin_calls_are_on_their_own_listener_only(client: httpx.Client):
    for path in ("/admin/releases", "/admin/rollback"):
        assert_problem(client.get(path), 404, "not-found")


def test_the_typed_client_says_everything(client: httpx.Client):
    with Client(str(client.base_url)) as typed:
        answer = typed.keep("a/b.c", [EventMessage(f"item-{n}", n, f"e{n}") for n in range(9)])
        assert [result.status for result in answer.results] == ["accepted"] * 9
        assert typed.keep_batch({"..": [EventMessage("item-1", 1)], "x": []}).answers[0].seq > answer.seq
        assert typed.correct("a/b.c", EventMessage("item-0", 1, "e1")).results[0].status != "rejected"
        assert typed.retract("a/b.c", "e2").results[0].status == "accepted"
        assert [kept.event_id for kept in typed.history("a/b.c").events][:3] == ["e0", "e1", "e3"]
        items = typed.recommend("a/b.c", k=3, request_time=None).items
        scores = typed.score("a/b.c", [item.item_id for item in items], request_time=None).scores
        assert [score.score for score in scores] == [item.score for item in items]
        assert typed.recommend_batch(["a/b.c"], k=3, request_time=None).answers[0].items == items
        assert typed.explain("a/b.c", "item-3").chunks
        assert typed.state("a/b.c").num_events == 8
        assert typed.forget("a/b.c").num_events == 8
        with pytest.raises(ClientError, match="invalid-k"):
            typed.recommend("ann", k=0)


def test_the_client_tries_again_where_there_was_no_room():
    waits: list[float] = []
    client = Client("http://127.0.0.1:9", tries=3)
    client._sleep = waits.append
    with pytest.raises(ClientError, match="ConnectError"):
        client.state("ann")
    assert len(waits) == 2


def test_verbs_send_a_log_and_ask(client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / "log.csv"
    rows = [f"{user},item-{n % 9},{100 + n},e{n}" for user in ("7", "8") for n in range(600)]
    log.write_text("user_id,item_id,timestamp,event_id\n" + "\n".join(rows))
    url = str(client.base_url).rstrip("/")
    assert main(["events", str(log), "--url", url]) == 0
    assert "1200 accepted" in capsys.readouterr().out
    assert main(["events", str(log), "--url", url]) == 0
    assert "1200 duplicate" in capsys.readouterr().out
    assert main(["ask", "7", "--url", url, "--k", "3", "--why"]) == 0
    asked = capsys.readouterr().out
    assert asked.startswith("600 events")
    assert "of the attention on summaries" in asked
    assert main(["recommend", "--url", url, "--user", "7", "--k", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[1:4] == asked.splitlines()[1:4]
    assert main(["recommend", "--url", url]) == 2
    assert main(["ask", "7", "--url", "http://127.0.0.1:9", "--k", "0"]) == 2
    log.write_text("user,item_id,timestamp\n")
    assert main(["events", str(log), "--url", url]) == 2
    assert "expected the column user_id" in capsys.readouterr().err


def test_load_is_sent_and_reported(make_service: MakeService, serve_in_thread: Any):
    room = ServeSettings(concurrent_questions=40, concurrent_writes=20)  # for all at once, as after a pause of both
    plan = Plan(recommend_rate=40, events_rate=100, events_per_call=5, users=5, items=9, seconds=1)
    with serve_in_thread(make_service(settings=room)) as client:
        outcomes = asyncio.run(run_plan(str(client.base_url), None, plan))
    assert {
        kind: {status: len(seconds) for status, seconds in met.seconds.items()} for kind, met in outcomes.items()
    } == {
        "recommend": {200: 40},
        "events": {200: 20},
    }
    assert re.match(r"recommend\s+40 requests  p50\s+[\d.]+ ms", report(outcomes)[0])


def test_load_gives_every_hundredth_user_a_long_history(client: httpx.Client, capsys: pytest.CaptureFixture[str]):
    command = f"load --url {client.base_url} --users 201 --items 9 --long-history 1500 --recommend 1 --seconds 1"
    for _ in range(2):  # sent again, it is known
        assert main(command.split()) == 0
        for user, num_events in (("u0", 1500), ("u1", 0), ("u100", 1500), ("u200", 1500)):
            assert client.get(f"/v1/users/{user}/state").json()["num_events"] == num_events
    assert "200: 1" in capsys.readouterr().out


def test_questions_that_wait_are_answered_in_one_pass(make_service: MakeService, serve_in_thread: Any):
    sizes: list[int] = []

    class Slow(ToyModel):
        def recommend(self, questions: Any) -> Any:
            sizes.append(len(questions))
            time.sleep(0.1)
            return super().recommend(questions)

    from dataclasses import replace

    from ksa_serving.testing import toy_release

    async def story() -> None:
        service = make_service(replace(toy_release(), model=Slow()), ServeSettings(limits=Limits(), batch_questions=8))
        from ksa_serving.messages import RecommendRequest

        answers = await asyncio.gather(
            *(service.questions.recommend(f"u{n}", RecommendRequest(k=3)) for n in range(20))
        )
        assert len({answer.items[0].score for answer in answers}) == 1
        assert service.log.head(Owner("u0")).num_events == 0
        await service.close()

    asyncio.run(story())
    assert sum(sizes) == 20
    assert max(sizes) > 1
    assert max(sizes) <= 8
