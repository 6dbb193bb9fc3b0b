import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ksa_serving.cold_store import ColdStateStore
from ksa_serving.event_log import EventLog
from ksa_serving.lmdb_engine import LmdbEngine
from ksa_serving.models import Model
from ksa_serving.service import Service
from ksa_serving.settings import Limits, ServeSettings
from ksa_serving.testing import toy_release
from ksa_serving.tiered_store import TieredStateStore

pytestmark = pytest.mark.service
NOW = 1_700_000_000  # where the service's clock stands (conftest)


def post(client: httpx.Client, user: str, *events: dict[str, Any]) -> httpx.Response:
    return client.post(f"/v1/users/{user}/events", json={"events": list(events)})


def ask(client: httpx.Client, user: str, **fields: Any) -> httpx.Response:
    return client.post(f"/v1/users/{user}/recommend", json=fields)


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    body = response.json()
    assert (response.status_code, body["code"]) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert body.keys() == {"type", "title", "status", "detail", "code"}
    assert body["status"] == status
    return body


def test_the_life_of_a_user(client: httpx.Client):
    new = ask(client, "ann", k=3).json()
    assert (len(new["items"]), new["num_events"], new["state_source"]) == (3, 0, "none")
    sent = post(
        client, "ann", {"item_id": "item-1", "timestamp": 100, "event_id": "1", "event_type": "buy", "value": 2.5}
    )
    assert sent.json() == {"results": [{"status": "accepted", "reason": None}], "seq": 1}
    known = ask(client, "ann", k=3)
    assert known.json() == {
        "items": known.json()["items"],
        "num_events": 1,
        "model_version": "toy-model",
        "index_version": "toy-index",
        "seq": 1,
        "state_seq": 1,
        "state_source": "rebuilt",
        "state_parity": "exact",
        "request_time": NOW,
        "beyond_trained_length": False,
        "degraded": False,
        "stale": False,
    }
    assert all(item.keys() == {"item_id", "score"} for item in known.json()["items"])
    assert known.json()["items"] != new["items"]
    late = post(client, "ann", {"item_id": "item-2", "timestamp": 50}).json()
    assert late["results"] == [{"status": "late-applied", "reason": None}]
    after = ask(client, "ann", k=3).json()
    assert (after["num_events"], after["state_seq"]) == (2, late["seq"])
    state = client.get("/v1/users/ann/state").json()
    assert (state["num_events"], state["seq"], state["state_source"]) == (2, late["seq"], "host")
    assert state["nbytes"] > 0


def test_duplicates_and_conflicts_leave_the_call_at_200(client: httpx.Client):
    first = {"item_id": "item-1", "timestamp": 100, "event_id": "e1"}
    post(client, "ann", first)
    again = post(client, "ann", first, {**first, "item_id": "item-2"}, {"item_id": "item-9", "timestamp": -5})
    assert again.status_code == 200
    assert again.json() == {
        "results": [
            {"status": "duplicate", "reason": None},
            {"status": "rejected", "reason": "conflict"},
            {"status": "rejected", "reason": "negative-time"},
        ],
        "seq": 1,
    }


def test_a_user_given_only_by_events(client: httpx.Client):
    answer = ask(client, "eve", k=5, events=[{"item_id": "item-1", "timestamp": 100}], request_time=200)
    assert answer.json()["num_events"] == 1
    assert client.get("/v1/users/eve/state").json()["num_events"] == 0


def test_request_time_missing_null_and_before_the_last_event(client: httpx.Client):
    post(client, "ann", {"item_id": "item-1", "timestamp": 100})
    assert ask(client, "ann").json()["request_time"] == NOW
    assert ask(client, "ann", request_time=None).json()["request_time"] is None
    before, at = ask(client, "ann", request_time=0).json(), ask(client, "ann", request_time=100).json()
    assert before["items"] == at["items"]


def test_unknown_items_are_kept_and_never_fail(client: httpx.Client):
    sent = post(client, "ann", {"item_id": "never heard of", "timestamp": 1}, {"item_id": "☃", "timestamp": 2})
    assert [result["status"] for result in sent.json()["results"]] == ["accepted", "accepted"]
    assert ask(client, "ann").json()["num_events"] == 2


@pytest.mark.parametrize(
    "segment",
    [
        "ann%20lee",
        "%E2%98%83",
        "a%2Fb",
        "%2e%2e",
        "50%25",
        "a%2520b",
        "semi%3Bcolon",
        "q%3Fm",
        "a.b-c_d~e",
        "user%40mail",
    ],
)
def test_user_ids_may_hold_any_text(shared_client: httpx.Client, segment: str):
    base = f"http://{shared_client.base_url.host}:{shared_client.base_url.port}"
    path = httpx.URL(base).copy_with(raw_path=f"/v1/users/{segment}/events".encode())
    sent = shared_client.post(path, json={"events": [{"item_id": "item-1", "timestamp": 1}]})
    assert sent.json()["results"][0]["status"] == "accepted"
    state = shared_client.get(httpx.URL(base).copy_with(raw_path=f"/v1/users/{segment}/state".encode()))
    assert state.json()["num_events"] == 1
    other = shared_client.get(httpx.URL(base).copy_with(raw_path=b"/v1/users/other/state"))
    assert other.json()["num_events"] == 0


def test_one_id_spelt_two_ways_is_one_user(client: httpx.Client):
    base = f"http://{client.base_url.host}:{client.base_url.port}"
    post(client, "ann", {"item_id": "item-1", "timestamp": 1})
    state = client.get(httpx.URL(base).copy_with(raw_path=b"/v1/users/%61nn/state"))
    assert state.json()["num_events"] == 1


@pytest.mark.parametrize(
    ("segment", "code"), [("%ff%fe", "invalid-user-id"), ("a%00b", "invalid-user-id"), ("x" * 257, "invalid-user-id")]
)
def test_user_ids_that_are_no_text_are_refused(shared_client: httpx.Client, segment: str, code: str):
    base = f"http://{shared_client.base_url.host}:{shared_client.base_url.port}"
    path = httpx.URL(base).copy_with(raw_path=f"/v1/users/{segment}/state".encode())
    assert_problem(shared_client.get(path), 400, code)


@pytest.mark.parametrize(
    ("body", "code", "word"),
    [
        (b"", "invalid-json", "truncated"),
        (b"{", "invalid-json", "truncated"),
        (b"\xff\xfe", "invalid-json", "JSON"),
        (b'{"events": [{"item_id": "\xff", "timestamp": 1}]}', "invalid-json", "utf-8"),
        (b'{"events": [{"item_id": "\\ud800", "timestamp": 1}]}', "invalid-json", "surrogate"),
        (b'{"events": [{"item_id": "a", "timestamp": NaN}]}', "invalid-json", "invalid"),
        (b"[]", "invalid-request", "array"),
        (b"null", "invalid-request", "null"),
        (b"{}", "invalid-request", "events"),
        (b'{"events": null}', "invalid-request", "events"),
        (b'{"events": [], "evnts": []}', "invalid-request", "evnts"),
        (b'{"events": [{"item_id": "a"}]}', "invalid-request", "timestamp"),
        (b'{"events": [{"item_id": 5, "timestamp": 1}]}', "invalid-request", "item_id"),
        (b'{"events": [{"item_id": "a", "timestamp": "1"}]}', "invalid-request", "timestamp"),
        (b'{"events": [{"item_id": "a", "timestamp": 1.5}]}', "invalid-request", "timestamp"),
        (b'{"events": [{"item_id": "a", "timestamp": true}]}', "invalid-request", "timestamp"),
        (b'{"events": [{"item_id": "a", "timestamp": 1, "valeu": 1}]}', "invalid-request", "valeu"),
        (b"[" * 100_000, "invalid-request", "array"),
        (b'{"events": ' + b"[" * 100_000, "invalid-request", "array"),
        (b'{"a": ' * 50_000, "invalid-request", "a"),
    ],
)
def test_a_malformed_body_is_refused_by_name(shared_client: httpx.Client, body: bytes, code: str, word: str):
    detail = assert_problem(shared_client.post("/v1/users/ann/events", content=body), 400, code)["detail"]
    assert word in detail
    assert shared_client.get("/v1/users/ann/state").json()["num_events"] == 0


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"k": 0}, "invalid-k"),
        ({"k": 1001}, "invalid-k"),
        ({"k": 10**30}, "invalid-k"),
        ({"k": "10"}, "invalid-request"),
        ({"k": 1.5}, "invalid-request"),
        ({"k": None}, "invalid-request"),
        ({"list": "both"}, "invalid-request"),
        ({"list": "again", "exclude_seen": True}, "contradiction"),
        ({"request_time": -1}, "invalid-request-time"),
        ({"request_time": "now"}, "invalid-request"),
        ({"exclude_seen": "yes"}, "invalid-request"),
        ({"events": [{"item_id": "", "timestamp": 1}]}, "invalid-event"),
        ({"top": 5}, "invalid-request"),
    ],
)
def test_a_bad_question_is_refused_by_name(shared_client: httpx.Client, fields: dict[str, Any], code: str):
    assert_problem(ask(shared_client, "ann", **fields), 400, code)


def test_the_largest_k_gives_every_item(shared_client: httpx.Client):
    assert len(ask(shared_client, "ann", k=1000).json()["items"]) == 200


def test_events_at_the_limit_and_one_past_it(client: httpx.Client):
    many = [{"item_id": "a", "timestamp": n} for n in range(1001)]
    assert len(post(client, "ann", *many[:1000]).json()["results"]) == 1000
    assert_problem(post(client, "ann", *many), 400, "too-many-events")
    assert ask(client, "eve", events=many[:1000]).json()["num_events"] == 1000
    assert_problem(ask(client, "eve", events=many), 400, "too-many-events")


def padded(num_bytes: int) -> bytes:
    body = json.dumps({"events": [{"item_id": "a", "timestamp": 1}]}).encode()
    return body + b" " * (num_bytes - len(body))


def test_bodies_at_the_limit_and_one_past_it(client: httpx.Client):
    limit = 1024 * 1024
    assert client.post("/v1/users/ann/events", content=padded(limit)).status_code == 200
    assert_problem(client.post("/v1/users/bob/events", content=padded(limit + 1)), 413, "body-too-large")

    def chunked() -> Any:  # without a content length
        for _ in range(17):
            yield b" " * 65536

    assert_problem(client.post("/v1/users/bob/events", content=chunked()), 413, "body-too-large")
    assert client.get("/v1/users/bob/state").json()["num_events"] == 0


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET /livez HTTP/1.1\r\nx: ",
        b"POST /v1/users/a/events HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx:",
    ],
    ids=["line", "header", "trailer"],
)
def test_what_is_no_body_cannot_grow_without_end(shared_client: httpx.Client, start: bytes):
    with socket.create_connection((shared_client.base_url.host, shared_client.base_url.port)) as connection:
        connection.settimeout(120)
        connection.sendall(start)
        with contextlib.suppress(ConnectionError):
            for size in [4096] * 128 + [1] * 12_000:  # half a MiB, then two minutes in which it has to be seen
                connection.send(b"a" * size)
                time.sleep(0.01 if size == 1 else 0.001)
            pytest.fail("nobody refused it")
    assert shared_client.get("/livez").status_code == 200


def test_headers_beyond_their_limit_are_refused(shared_client: httpx.Client):
    ordinary = sum(len(name) + len(value) for name, value in shared_client.build_request("GET", "/livez").headers.raw)
    fill = 16 * 1024 - ordinary - len("x")
    assert shared_client.get("/livez", headers={"x": "a" * fill}).status_code == 200
    assert_problem(shared_client.get("/livez", headers={"x": "a" * (fill + 1)}), 431, "headers-too-large")
    with socket.create_connection((shared_client.base_url.host, shared_client.base_url.port or 0)) as connection:
        with contextlib.suppress(ConnectionError):  # closed before all was sent
            connection.sendall(b"GET /livez HTTP/1.1\r\nX: " + b"a" * 200_000)  # never ends
        assert b"400" in connection.recv(1000).split(b"\r\n")[0]


def test_unknown_paths_and_methods(shared_client: httpx.Client):
    assert_problem(shared_client.get("/v1/users"), 404, "not-found")
    assert_problem(shared_client.post("/v1/users/ann/erase", json={}), 404, "not-found")
    refused = shared_client.put("/v1/users/ann/events", json={})
    assert_problem(refused, 405, "method-not-allowed")
    assert "POST" in refused.headers["allow"]


def test_pages_of_other_sites_are_refused(client: httpx.Client):
    body = {"events": [{"item_id": "a", "timestamp": 1}]}
    for origin in ("https://evil.example", "null", "http://[", "http://127.0.0.1.evil.example"):
        refused = client.post("/v1/users/ann/events", json=body, headers={"Origin": origin})
        assert_problem(refused, 403, "foreign-origin")
    own = client.post("/v1/users/ann/events", json=body, headers={"Origin": "http://localhost:1234"})
    assert own.status_code == 200


def test_health_metrics_and_openapi(client: httpx.Client):
    post(client, "ann", {"item_id": "item-1", "timestamp": 1})
    ask(client, "ann")
    assert client.get("/livez").json()["status"] == "ok"
    assert client.get("/readyz").json()["status"] == "ok"
    text = client.get("/metrics").text
    assert 'ksa_requests_total{route="events",status="200"} 1.0' in text
    assert 'ksa_events_total{status="accepted"} 1.0' in text
    assert 'ksa_states_held{tier="memory"} 1.0' in text
    assert 'ksa_audits_total{result="different"} 0.0' in text  # told before it happens, or no alert would ring
    assert 'ksa_state_misses_total{cause="fingerprint"} 0.0' in text
    assert "ann" not in text
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert document["components"]["schemas"]["RecommendRequest"]["additionalProperties"] is False
    assert "list" in document["components"]["schemas"]["RecommendRequest"]["properties"]
    assert set(document["paths"]) >= {"/v1/users/{user_id}/events", "/v1/users/{user_id}/recommend"}


def test_metrics_tell_tiers_lag_commits_and_why_events_were_rejected(tmp_path: Path, serve_in_thread: Any):
    log, release = EventLog(tmp_path, "arrival"), toy_release()
    models: dict[str, Model] = {release.state_fingerprint: release.model}
    cold = ColdStateStore(LmdbEngine(tmp_path, 10**7), models, log.salt)
    store = TieredStateStore(4000, cold, lambda num_events: num_events > 20, spill_events=8)
    service = Service(release, log, store, ServeSettings(catch_up_seconds=60), clock=lambda: 1e9, models=models)
    with serve_in_thread(service) as client:

        def told() -> dict[str, float]:
            lines = client.get("/metrics").text.splitlines()
            return {name: float(value) for name, value in (line.split() for line in lines if line[0] != "#")}

        before = told()
        for user in range(4):
            events = [{"item_id": f"item-{n}", "timestamp": n} for n in range(50)]
            events += [events[0], {"item_id": "x", "timestamp": -1}, {"item_id": "", "timestamp": 1}]
            post(client, f"u{user}", *events)
            ask(client, f"u{user}")
        after = told()
    assert after['ksa_events_total{status="duplicate"}'] == 4
    assert after['ksa_event_rejections_total{reason="negative-time"}'] == 4
    assert after['ksa_event_rejections_total{reason="empty-item-id"}'] == 4
    assert (before["ksa_replay_lag_entries"], after["ksa_replay_lag_entries"]) == (0, 4 * 50)
    assert 0 < after["ksa_replay_lag_seconds"] < 600
    assert before["ksa_replay_lag_seconds"] == 0
    assert after['ksa_states_held{tier="cold"}'] == 4
    assert 0 < after['ksa_state_bytes{tier="memory"}'] <= 4000 < after['ksa_state_bytes{tier="cold"}']
    assert after['ksa_states_held{tier="memory"}'] + after['ksa_state_evictions_total{tier="memory"}'] == 4
    assert after["ksa_commit_seconds_count"] - before["ksa_commit_seconds_count"] == 4
    assert 0 < after["ksa_sync_seconds_sum"] < after["ksa_commit_seconds_sum"]
    assert set(before) <= set(after)
    assert len(after) < 600  # none of a user


def test_a_mistake_of_ours_is_a_500_that_tells_nothing_private(
    make_service: Callable[..., Service], serve_in_thread: Any, caplog: pytest.LogCaptureFixture
):
    service = make_service()

    def broken(*_: Any) -> Any:
        raise RuntimeError("boom")

    service.served.states.current = broken  # type: ignore[method-assign]
    with serve_in_thread(service) as client:
        answer = ask(client, "ann-secret")
        assert_problem(answer, 500, "internal-error")
        assert "boom" not in answer.text
    assert "boom" in caplog.text
    assert "ann-secret" not in caplog.text


def test_a_log_that_cannot_be_written_is_a_503_to_come_back_to(
    make_service: Callable[..., Service], serve_in_thread: Any
):
    service = make_service()
    service.log._connection.pragma("max_page_count", 1)
    with serve_in_thread(service) as client:
        refused = post(client, "ann", *({"item_id": f"{n:0200}", "timestamp": n} for n in range(1000)))
        assert_problem(refused, 503, "event-log-unavailable")
        assert refused.headers["retry-after"] == "1"
        assert ask(client, "ann").json()["num_events"] == 0  # reading goes on


def test_limits_follow_the_settings(make_service: Callable[..., Service], serve_in_thread: Any):
    settings = ServeSettings(limits=Limits(body_bytes=100, k=2))
    with serve_in_thread(make_service(settings=settings)) as client:
        assert_problem(client.post("/v1/users/ann/events", content=padded(101)), 413, "body-too-large")
        assert client.post("/v1/users/ann/events", content=padded(100)).status_code == 200
        assert_problem(ask(client, "ann", k=3), 400, "invalid-k")


def test_requests_beyond_the_bound_are_told_to_come_back(make_service: Callable[..., Service], serve_in_thread: Any):
    service = make_service(settings=ServeSettings(concurrent_questions=2))
    started, go_on = threading.Semaphore(0), threading.Event()
    current, run_alone = service.served.states.current, service.workers.run_alone

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(120)
        return current(*arguments)

    def watched(*arguments: Any) -> Any:
        started.release()
        return run_alone(*arguments)

    service.served.states.current = slow  # type: ignore[method-assign]
    service.workers.run_alone = watched  # type: ignore[method-assign]
    with serve_in_thread(service) as client, ThreadPoolExecutor() as pool:
        held = [pool.submit(ask, client, user) for user in ("ann", "bob")]
        for _ in held:
            assert started.acquire(timeout=120)
        refused = ask(client, "cat")
        assert_problem(refused, 503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert client.get("/livez").status_code == 200
        go_on.set()
        assert [answer.result().status_code for answer in held] == [200, 200]
        assert ask(client, "cat").status_code == 200
