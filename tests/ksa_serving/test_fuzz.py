"""Random requests, half right and half wrong, never make the service fail."""

import json
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.service

texts = st.text(max_size=12)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
times = st.one_of(st.integers(-5, 50), st.integers(0, 2**70))
events = st.fixed_dictionaries(
    {"item_id": texts, "timestamp": times},
    optional={"event_id": st.one_of(texts, st.none()), "event_type": texts, "value": st.floats(-1e9, 1e9)},
)
nearly_events = st.one_of(events, events, events, st.dictionaries(texts, anything, max_size=3))
posts = st.fixed_dictionaries({"events": st.lists(nearly_events, max_size=4)})
questions = st.fixed_dictionaries(
    {},
    optional={
        "k": st.one_of(st.integers(-2, 1005), anything),
        "request_time": st.one_of(times, st.none(), anything),
        "exclude_seen": st.one_of(st.booleans(), st.none()),
        "list": st.sampled_from(["all", "again", "new", "old"]),
        "events": st.lists(nearly_events, max_size=3),
    },
)
calls = st.one_of(
    st.tuples(st.just("events"), st.one_of(posts, anything)),
    st.tuples(st.just("recommend"), st.one_of(questions, anything)),
)


def encode(body: object) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(user=st.text(min_size=1, max_size=8), call=calls, cut=st.integers(0, 400))
def test_no_request_makes_the_service_fail(shared_client: httpx.Client, user: str, call: tuple[str, object], cut: int):
    verb, body = call
    content = encode(body)
    if cut < 20:
        content = content[: len(content) - cut]
    segment = quote(user.encode("utf-8", "surrogatepass"), safe="").replace(".", "%2E")  # "." alone is no path segment
    path = shared_client.base_url.copy_with(raw_path=f"/v1/users/{segment}/{verb}".encode())
    answer = shared_client.post(path, content=content)
    assert answer.status_code in (200, 400), (answer.status_code, answer.text, content)
    if answer.status_code == 400:
        assert answer.json().keys() == {"type", "title", "status", "detail", "code"}
    elif verb == "events":
        assert len(answer.json()["results"]) == len(json.loads(content)["events"])
