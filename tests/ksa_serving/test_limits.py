"""Every limit of a request holds at the limit, and is refused by name one past it, over HTTP, by the real defaults."""

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from test_app import assert_problem

from ksa_serving.openapi import openapi_document
from ksa_serving.service import Service
from ksa_serving.settings import Limits, ServeSettings

pytestmark = pytest.mark.service
MakeService = Callable[..., Service]
MOST_DEPTH = 8
"""Of JSON: no message nests deeper, so nothing deeper is taken."""
users = itertools.count()


def event(**fields: Any) -> dict[str, Any]:
    return {"item_id": "item-1", "timestamp": 1, **fields}


def some(count: int) -> list[str]:
    return [f"item-{n % 200}" for n in range(count)]


LIMITS: dict[str, tuple[str, Callable[[int], Any], int, str]] = {
    "events": ("events", lambda n: {"events": [event(timestamp=t) for t in range(n)]}, 1000, "too-many-events"),
    "events asked": (
        "recommend",
        lambda n: {"events": [event(timestamp=t) for t in range(n)]},
        1000,
        "too-many-events",
    ),
    "k": ("recommend", lambda n: {"k": n}, 1000, "invalid-k"),
    "allow": ("recommend", lambda n: {"allow": some(n)}, 4096, "too-many-items"),
    "deny": ("recommend", lambda n: {"deny": some(n)}, 4096, "too-many-items"),
    "scores": ("score", lambda n: {"item_ids": some(n)}, 4096, "too-many-items"),
    "titles": ("/v1/items:titles", lambda n: {"item_ids": some(n)}, 4096, "too-many-items"),
    "chunks": ("explain", lambda n: {"item_id": "item-1", "chunks": n}, 64, "invalid-chunks"),
    "users asked": ("/v1/recommend:batch", lambda n: {"user_ids": some(n)}, 256, "too-many-users"),
    "users sent": (
        "/v1/events:batch",
        lambda n: {"users": [{"user_id": f"batch-{u}", "events": []} for u in range(n)]},
        256,
        "too-many-users",
    ),
    "events of all users": (
        "/v1/events:batch",
        lambda n: {"users": [{"user_id": "u", "events": [event()]}, {"user_id": "v", "events": (n - 1) * [event()]}]},
        1000,
        "too-many-events",
    ),
    "user id": (
        "/v1/events:batch",
        lambda n: {"users": [{"user_id": n * "u", "events": []}]},
        256,
        "invalid-user-id",
    ),
    "body": ("events", lambda n: b'{"events": []}' + (n - 14) * b" ", 1024 * 1024, "body-too-large"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_and_one_past_it(shared_client: httpx.Client, name: str):
    path, body, most, code = LIMITS[name]
    path = path if path.startswith("/") else f"/v1/users/limit-{next(users)}/{path}"

    def post(count: int) -> httpx.Response:
        sent = body(count)
        return shared_client.post(path, content=sent if isinstance(sent, bytes) else json.dumps(sent))

    assert post(most).status_code == 200, name
    assert_problem(post(most + 1), 413 if name == "body" else 400, code)


@pytest.mark.parametrize(
    ("field", "most", "reason"),
    [
        ("item_id", 256, "item-id-too-long"),
        ("event_id", 64, "event-id-too-long"),
        ("event_type", 64, "event-type-too-long"),
    ],
)
def test_the_longest_texts_of_an_event_and_one_byte_more(
    shared_client: httpx.Client, field: str, most: int, reason: str
):
    sent = {"events": [event(**{field: most * "x"}), event(**{field: (most + 1) * "x"})]}
    results = shared_client.post(f"/v1/users/limit-{next(users)}/events", json=sent).json()["results"]
    assert [(result["status"], result["reason"]) for result in results] == [("accepted", None), ("rejected", reason)]


def test_the_most_events_of_one_user_and_one_more(make_service: MakeService, serve_in_thread: Any):
    assert Limits().user_events == 1_000_000
    service = make_service()
    service.log._entries._user_events = 3  # as `ksa serve` sets it
    with serve_in_thread(service) as client:
        sent = {"events": [event(timestamp=t) for t in range(4)]}
        results = client.post("/v1/users/ann/events", json=sent).json()["results"]
        assert [result["status"] for result in results] == ["accepted"] * 3 + ["rejected"]
        assert results[3]["reason"] == "history-full"


@pytest.mark.parametrize(("milliseconds", "status"), [("1", (200, 504)), ("600000", (200,)), ("600001", (400,))])
def test_the_longest_deadline_and_one_more(shared_client: httpx.Client, milliseconds: str, status: tuple[int, ...]):
    answer = shared_client.post("/v1/users/ann/recommend", json={}, headers={"x-deadline-ms": milliseconds})
    assert answer.status_code in status


def depth(schema: dict[str, Any], schemas: dict[str, Any], within: tuple[str, ...] = ()) -> int:
    """Return how deep JSON of a schema nests; a value is of depth 0."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/")[-1]
        assert name not in within, "a message that holds itself nests without end"
        return depth(schemas[name], schemas, (*within, name))
    inner = [*schema.get("anyOf", []), *schema.get("properties", {}).values()]
    inner += [one for key in ("items", "additionalProperties") if isinstance(one := schema.get(key), dict)]
    deepest = max((depth(one, schemas, within) for one in inner), default=0)
    return deepest + (schema.get("type") in ("array", "object"))


def test_no_message_nests_deeper_than_json_may():
    document = openapi_document()
    schemas = document["components"]["schemas"]
    depths = {name: depth(schema, schemas, (name,)) for name, schema in schemas.items()}
    assert depths["EventsRequest"] == 3  # {[{}]}
    assert max(depths.values()) <= MOST_DEPTH


def nested(levels: int) -> Iterator[str]:
    """Yield JSON of so many levels: lists, and objects."""
    yield "[" * levels + "]" * levels
    yield '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [MOST_DEPTH, MOST_DEPTH + 1, 100_000])
@pytest.mark.parametrize(
    ("call", "before", "after"),
    [
        ("events", "", ""),
        ("events", '{"events":', "}"),
        ("events", '{"events":[{"item_id":"a","timestamp":1,"value":', "}]}"),
        ("recommend", '{"user":{"age":', "}}"),
        ("recommend", '{"events":[', "]}"),
        ("score", '{"item_ids":[', "]}"),
    ],
)
def test_what_nests_as_deep_or_deeper_is_refused(
    shared_client: httpx.Client, call: str, before: str, after: str, levels: int
):
    for value in nested(levels):
        answer = shared_client.post(f"/v1/users/ann/{call}", content=f"{before}{value}{after}")
        assert answer.status_code == 400
        assert answer.json()["code"] in ("invalid-request", "invalid-json")


def still_open(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    with contextlib.suppress(TimeoutError):
        while connection.recv(10_000):  # an answer
            pass
        return False
    return True


HEAD = b"POST /v1/users/ann/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"POST /v1", HEAD, HEAD + b'{"k"', HEAD + b'{"k": 3}', HEAD + b'{"k": 3}POST'])
def test_a_connection_on_which_nothing_comes_is_closed(make_service: MakeService, serve_in_thread: Any, sent: bytes):
    assert ServeSettings().keep_alive_seconds == 15
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(serve_in_thread(make_service(settings=ServeSettings(keep_alive_seconds=1))))
        began = time.monotonic()
        connection = stack.enter_context(socket.create_connection((client.base_url.host, client.base_url.port)))
        connection.sendall(sent)
        while still_open(connection):
            assert time.monotonic() - began < 120
        assert time.monotonic() - began > 0.9


def test_a_connection_on_which_something_comes_is_kept(make_service: MakeService, serve_in_thread: Any):
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(serve_in_thread(make_service(settings=ServeSettings(keep_alive_seconds=4))))
        connection = stack.enter_context(socket.create_connection((client.base_url.host, client.base_url.port)))
        for part in (HEAD[:9], HEAD[9:], b'{"k"', b": 3}", HEAD, b'{"k": 3}'):
            time.sleep(1)
            connection.sendall(part)
        assert still_open(connection)
