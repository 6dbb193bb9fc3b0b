"""More requests than can be answered: who is refused is told so and costs nothing, who is not is answered."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import httpx
import pytest
from test_app import assert_problem
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from ksa_serving import log_writer
from ksa_serving.app import create_app
from ksa_serving.events import Owner
from ksa_serving.load import Plan, run_plan
from ksa_serving.server import crowding_call, server_config
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import toy_release

MakeService = Callable[..., Service]
HEAD = b"POST /v1/users/ann/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\n"


async def call_at_once(client: httpx.Client, kind: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=client.base_url, timeout=300, limits=limits) as crowd:
        calls = (crowd.post(f"/v1/users/u{number % 7}/{kind}", json=body) for number, body in enumerate(bodies))
        return list(await asyncio.gather(*calls))


@contextlib.contextmanager
def writer_held(service: Service) -> Iterator[None]:
    """Let the log's writer begin nothing."""
    go_on = threading.Event()
    held = service.log.writer.submit(lambda: go_on.wait(300), 10**9)  # a transaction of its own
    try:
        while not held.running():
            time.sleep(0.001)
        yield
    finally:
        go_on.set()


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not true():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_while_writes_crowd_states_follow_less_until_they_lag(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
):
    service = make_service(settings=ServeSettings(concurrent_writes=4, unready_after_seconds=8.0, catch_up_share=0.2))
    upkeep, room = service.upkeep, service.rooms.writing
    assert room.enter()
    assert room.enter()
    assert upkeep.catch_up_share == 0.2
    assert room.enter()
    assert 0 < upkeep.catch_up_share < 0.2
    monkeypatch.setattr(type(upkeep), "lag_seconds", property(lambda _: 2.0))
    assert upkeep.catch_up_share == 0.2
    service.log.close()


def test_questions_beyond_the_room_are_refused_and_not_computed(make_service: MakeService, serve_in_thread: Any):
    service = make_service(settings=ServeSettings(concurrent_questions=4))
    asked: list[Any] = []
    go_on = threading.Event()
    recommend = service.served.release.model.recommend

    def held(questions: Any) -> Any:
        asked.extend(questions)
        assert go_on.wait(300)
        return recommend(questions)

    service.served.answers._answer_all = held
    with serve_in_thread(service) as client:
        answers: list[httpx.Response] = []
        bodies = [{"k": 3}] * 60
        thread = threading.Thread(target=lambda: answers.extend(asyncio.run(call_at_once(client, "recommend", bodies))))
        thread.start()
        eventually(lambda: service.metrics.refused.labels("overloaded")._value.get() == 60 - 4)
        assert client.post("/v1/users/u0/events", json={"events": []}).status_code == 200  # writes have their own room
        go_on.set()
        thread.join()
        refused = [answer for answer in answers if answer.status_code != 200]
        for answer in refused:
            assert_problem(answer, 503, "overloaded")
            assert answer.headers["retry-after"] == "1"
        assert len(asked) == len(answers) - len(refused) == 4
        eventually(lambda: service.rooms.asking.under_way == 0)
        assert client.post("/v1/users/ann/recommend", json={}).status_code == 200


def test_events_beyond_the_room_are_refused_and_not_kept(make_service: MakeService, serve_in_thread: Any):
    service = make_service(settings=ServeSettings(concurrent_writes=4))
    bodies = [{"events": [{"item_id": f"item-{n}", "timestamp": n}]} for n in range(60)]
    with serve_in_thread(service) as client:
        with writer_held(service):
            crowd: list[httpx.Response] = []
            thread = threading.Thread(target=lambda: crowd.extend(asyncio.run(call_at_once(client, "events", bodies))))
            thread.start()
            eventually(lambda: service.log.writer.num_waiting == 4)
            assert client.post("/v1/users/ann/recommend", json={}).status_code == 200  # questions have their own room
            assert_problem(client.post("/v1/users/u0/events", json=bodies[0]), 503, "overloaded")
            assert_problem(client.delete("/v1/users/u0"), 503, "overloaded")
            assert client.get("/livez").status_code == 200
            eventually(lambda: service.metrics.refused.labels("overloaded")._value.get() == 60 - 4 + 2)
        thread.join()
        kept = [body["events"][0]["item_id"] for body, answer in zip(bodies, crowd) if answer.status_code == 200]
        for answer in crowd:
            if answer.status_code != 200:
                assert_problem(answer, 503, "overloaded")
                assert answer.headers["retry-after"] == "1"
        found = [event.item_id for user in range(7) for event in service.log.read(Owner(f"u{user}"))[1]]
        assert len(kept) == 4
        assert sorted(found) == sorted(kept)
        assert client.post("/v1/users/u0/events", json=bodies[0]).status_code == 200


EVENT = {"item_id": "item-1", "timestamp": 1, "event_id": "e1"}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/events", {"events": [{**EVENT, "event_id": "e2"}]}),
        ("PUT", "/events/e1", {**EVENT, "item_id": "item-2"}),
        ("PUT", "/events/e2", {**EVENT, "event_id": "e2"}),
        ("DELETE", "/events/e1", None),
        ("DELETE", "", None),
    ],
)
def test_what_expired_while_it_waited_to_be_written_was_not_done(
    make_service: MakeService,
    serve_in_thread: Any,
    method: str,
    path: str,
    body: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    service = make_service()
    with serve_in_thread(service) as client:

        def call() -> httpx.Response:
            headers = {"x-deadline-ms": "500000"}
            return client.request(method, f"/v1/users/ann{path}", json=body, headers=headers)

        client.post("/v1/users/ann/events", json={"events": [EVENT]})
        before = service.log.read(Owner("ann"))
        late: list[httpx.Response] = []
        with monkeypatch.context() as later:
            with writer_held(service):
                thread = threading.Thread(target=lambda: late.append(call()))
                thread.start()
                eventually(lambda: service.log.writer.num_waiting == 1)
                clock = {**vars(time), "monotonic": lambda: time.monotonic() + 501}
                later.setattr(log_writer, "time", SimpleNamespace(**clock))
            thread.join()
        assert_problem(late[0], 504, "deadline-exceeded")
        assert service.log.read(Owner("ann")) == before
        assert call().status_code == 200
        assert service.log.read(Owner("ann")) != before


def test_an_open_loop_beyond_capacity(make_service: MakeService, serve_in_thread: Any):
    settings = ServeSettings(concurrent_questions=4, concurrent_writes=4)
    service = make_service(toy_release(clock="relative"), settings)
    recommend = service.served.release.model.recommend

    def slow(questions: Any) -> Any:
        time.sleep(0.02)
        return recommend(questions)

    service.served.answers._answer_all = slow
    with serve_in_thread(service) as client:
        plan = Plan(recommend_rate=400, events_rate=400, events_per_call=1, users=9, items=9, seconds=1)
        outcomes = asyncio.run(run_plan(str(client.base_url), None, plan))
        for outcome in outcomes.values():
            assert len(outcome) == 400
            assert outcome.seconds[200]
            assert outcome.seconds.keys() <= {200, 503}
        assert service.log.counts()[1] == len(outcomes["events"].seconds[200])
        eventually(lambda: (service.rooms.asking.under_way, service.rooms.writing.under_way) == (0, 0))


def test_who_sends_slowly_takes_no_room(make_service: MakeService, serve_in_thread: Any):
    service = make_service(settings=ServeSettings(concurrent_questions=1))
    with serve_in_thread(service) as client, contextlib.ExitStack() as stack:
        address = (client.base_url.host, client.base_url.port)
        slow = [stack.enter_context(socket.create_connection(address)) for _ in range(5)]
        for connection in slow:
            connection.sendall(HEAD + b'{"k"')
        for _ in range(5):
            assert client.post("/v1/users/ann/recommend", json={}).status_code == 200
        for connection in slow:
            connection.sendall(b": 3 ")
            connection.sendall(b"}")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")  # 9 bytes where 8 were told
        eventually(lambda: service.rooms.asking.under_way == 0)


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + b"not json",
        HEAD.replace(b"ann", b"%ff") + b'{"k": 3}',
        HEAD.replace(b"host: x", b"ho st: x") + b'{"k": 3}',
        HEAD.replace(b"host: x", b"x-deadline-ms: soon") + b'{"k": 3}',
        HEAD.replace(b"host: x", b"origin: http://elsewhere") + b'{"k": 3}',
        HEAD.replace(b"host: x", b"a: " + b"a" * 20_000) + b'{"k": 3}',
        HEAD.replace(b"host: x", b"content-length: 9") + b'{"k": 3}',
    ],
)
def test_room_is_left_by_what_is_no_request(make_service: MakeService, serve_in_thread: Any, request_: bytes):
    service = make_service(settings=ServeSettings(concurrent_questions=1))
    with serve_in_thread(service) as client:
        for _ in range(3):
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(request_)
                assert connection.recv(100).startswith(b"HTTP/1.1 4")
        assert client.post("/v1/users/ann/recommend", json={"k": 3}).status_code == 200
        eventually(lambda: service.rooms.asking.under_way == 0)


def test_connections_beyond_the_bound_are_refused_by_type(make_service: MakeService, serve_in_thread: Any):
    service = make_service(settings=ServeSettings(connections=2, keep_alive_seconds=600))
    with serve_in_thread(service) as client, contextlib.ExitStack() as stack:
        assert client.get("/livez").status_code == 200
        address = (client.base_url.host, client.base_url.port)
        _, third = (stack.enter_context(socket.create_connection(address)) for _ in range(2))
        third.settimeout(120)
        third.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while part := third.recv(10_000):
            answer += part
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b'"code":"overloaded"' in answer
        assert client.get("/livez").status_code == 200


def test_a_refusal_keeps_the_connection_as_long_as_an_answer(make_service: MakeService):
    service = make_service(settings=ServeSettings(concurrent_questions=1))
    service.rooms.asking.enter()

    async def refuse_and_wait() -> None:
        config = server_config(create_app(service), service)
        config.load()
        kind = cast(type[HttpToolsProtocol], config.http_protocol_class)
        protocol = kind(config, ServerState(), {})
        transport = Mock()
        transport.is_closing.return_value = False
        protocol.connection_made(transport)
        for _ in range(2):
            protocol.data_received(HEAD + b'{"k": 3}')
        assert [call.args[0][:12] for call in transport.write.mock_calls] == 2 * [b"HTTP/1.1 503"]
        waiting = protocol.timeout_keep_alive_task
        protocol.timeout_keep_alive_handler()  # that of the first refusal
        assert not transport.close.called
        assert protocol.timeout_keep_alive_task not in (None, waiting)
        cast(Any, protocol)._refused_at -= protocol.timeout_keep_alive
        protocol.timeout_keep_alive_handler()
        assert transport.close.called

    asyncio.run(refuse_and_wait())


def test_what_comes_in_crowds():
    body = b'{"k": 3}'
    assert crowding_call(HEAD + body) == "recommend"
    assert crowding_call(HEAD.replace(b"/recommend", b"/events") + body) == "events"
    assert crowding_call(HEAD.replace(b"host", b"Connection: Keep-Alive\r\nhost") + body) == "recommend"
    for other in (
        HEAD,
        HEAD + body[:-1],
        HEAD + body + HEAD + body,
        HEAD.replace(b"content-length: 8", b"transfer-encoding: chunked") + body,
        HEAD.replace(b"host", b"connection: close\r\nhost") + body,
        HEAD.replace(b"host", b"transfer-encoding: chunked\r\nhost") + body,
        HEAD.replace(b"content-length: 8", b"content-length: eight") + body,
        HEAD[:-2] + 900 * b"content-length: 8\r\n",  # tried line by line in every way it would take for ever
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + body,
        HEAD.replace(b"POST", b"GET") + body,
        HEAD.replace(b"/v1/users/ann/recommend", b"/livez") + body,
        HEAD.replace(b"/recommend", b"/explain") + body,
        b"",
        b"\x16\x03\x01",
    ):
        assert crowding_call(other) == "", other
