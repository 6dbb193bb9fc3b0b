"""Random requests, half right and half wrong, never make the service fail."""

import json
import os
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
told = st.dictionaries(texts, anything, max_size=3)
questions = st.fixed_dictionaries(
    {},
    optional={
        "k": st.one_of(st.integers(-2, 1005), anything),
        "request_time": st.one_of(times, st.none(), anything),
        "exclude_seen": st.one_of(st.booleans(), st.none()),
        "list": st.sampled_from(["all", "again", "new", "old"]),
        "events": st.lists(nearly_events, max_size=3),
        "user": told,
    },
)
items = st.lists(st.one_of(texts, st.sampled_from(["item-1", "item-2"])), max_size=4)
when = st.one_of(times, st.none(), anything)
scores = st.fixed_dictionaries({"item_ids": items}, optional={"request_time": when, "min_seq": st.integers(-2, 0)})
reasons = st.fixed_dictionaries(
    {"item_id": st.sampled_from(["item-1", "x"])}, optional={"chunks": st.integers(-1, 70), "user": told}
)
several = st.fixed_dictionaries(
    {"user_ids": st.lists(texts, max_size=3)}, optional={"k": st.integers(0, 5), "users": st.lists(told, max_size=3)}
)
posts_of_several = st.fixed_dictionaries(
    {
        "users": st.lists(
            st.fixed_dictionaries({"user_id": texts, "events": st.lists(nearly_events, max_size=2)}), max_size=3
        )
    }
)
calls = st.one_of(
    st.tuples(st.just("POST /events"), st.one_of(posts, anything)),
    st.tuples(st.just("POST /recommend"), st.one_of(questions, anything)),
    st.tuples(st.just("POST /score"), st.one_of(scores, anything)),
    st.tuples(st.just("POST /explain"), st.one_of(reasons, anything)),
    st.tuples(st.just("PUT /events/e1"), st.one_of(nearly_events, anything)),
    st.tuples(st.just("DELETE /events/e1"), anything),
    st.tuples(st.just("DELETE "), anything),
    st.tuples(st.just("GET /events?limit=3"), anything),
    st.tuples(st.just("POST batch /v1/recommend:batch"), st.one_of(several, anything)),
    st.tuples(st.just("POST batch /v1/events:batch"), st.one_of(posts_of_several, anything)),
    st.tuples(st.just("POST batch /v1/items:titles"), st.one_of(scores, anything)),
)


def encode(body: object) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")


EXAMPLES = int(os.environ.get("KSA_FUZZ", "10000"))
"""Requests: 30,000 with `make nightly`, 10^5 with FULL=1; each example sends five."""


@settings(max_examples=EXAMPLES // 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(user=st.text(min_size=1, max_size=8), some=st.lists(calls, min_size=5, max_size=5), cut=st.integers(0, 400))
def test_no_request_makes_the_service_fail(shared_client: httpx.Client, user: str, some: list, cut: int):
    for call, body in some:
        method, _, verb = call.partition(" ")
        content = encode(body)
        if cut < 20:
            content = content[: len(content) - cut]
        segment = quote(user.encode("utf-8", "surrogatepass"), safe="").replace(".", "%2E")  # "." is no path segment
        path = verb.removeprefix("batch ") if verb.startswith("batch ") else f"/v1/users/{segment}{verb}"
        url = shared_client.base_url.copy_with(raw_path=path.encode())
        answer = shared_client.request(method, url, content=content)
        assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, content)
        if answer.status_code != 200:
            assert answer.json().keys() == {"type", "title", "status", "detail", "code"}
            assert (answer.status_code == 404) <= (answer.json()["code"] == "unknown-event")
        elif call == "POST /events":
            assert len(answer.json()["results"]) == len(json.loads(content)["events"])
