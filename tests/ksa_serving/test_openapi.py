"""The API changes only on purpose: what is served is what was reviewed, and who breaks clients is told how."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ksa_serving.openapi import openapi_document, review
from ksa_serving.openapi_changes import Change, changes

pytestmark = pytest.mark.service
REVIEWED = Path(__file__).parents[2] / "serving" / "openapi.json"
Json = dict[str, Any]


def test_the_api_is_the_one_that_was_reviewed(shared_client: httpx.Client):
    served, reviewed = shared_client.get("/openapi.json").json(), json.loads(REVIEWED.read_text())
    found = [
        f"{'BREAKS CLIENTS' if change.breaks else 'breaks nobody'}: {change.what}"
        for change in changes(reviewed, served)
    ]
    renew = "Look at it, then renew with: python -m ksa_serving.openapi serving/openapi.json"
    assert served == reviewed, "\n".join(["the API is another than serving/openapi.json:", *found, renew])


def test_reviewing_writes_what_is_served_and_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "openapi.json"
    review(path)
    assert capsys.readouterr().out == ""
    old = json.loads(path.read_text())
    assert old == json.loads(json.dumps(openapi_document()))
    old["components"]["schemas"]["StateAnswer"]["properties"]["size"] = {"type": "integer"}
    path.write_text(json.dumps(old))
    review(path)
    assert capsys.readouterr().out == "breaks clients: StateAnswer.size is gone\n"


def fields(document: Json, name: str) -> Json:
    return document["components"]["schemas"][name]["properties"]


def require(document: Json, name: str, field: str) -> None:
    schema = document["components"]["schemas"][name]
    schema["required"] = [*schema.get("required", []), field]


EDITS: dict[str, tuple[Callable[[Json], object], str, bool]] = {
    "path": (lambda d: d["paths"].pop("/v1/items"), "GET /v1/items is gone", True),
    "method": (
        lambda d: d["paths"]["/v1/users/{user_id}/events"].pop("get"),
        "GET /v1/users/{user_id}/events is gone",
        True,
    ),
    "new path": (lambda d: d["paths"].update({"/x": {"get": {"responses": {}}}}), "GET /x is new", False),
    "parameter": (
        lambda d: d["paths"]["/v1/items"]["get"]["parameters"].pop(0),
        "GET /v1/items: parameter text is gone",
        True,
    ),
    "field sent": (lambda d: fields(d, "RecommendRequest").pop("deny"), "RecommendRequest.deny is gone", True),
    "field told": (lambda d: fields(d, "ScoredItem").pop("score"), "ScoredItem.score is gone", True),
    "new field": (lambda d: fields(d, "EventMessage").update(x={}), "EventMessage.x is new", False),
    "new required field": (
        lambda d: (fields(d, "EventMessage").update(x={}), require(d, "EventMessage", "x")),
        "EventMessage.x is new, and required",
        True,
    ),
    "new field always told": (
        lambda d: (fields(d, "ScoredItem").update(x={}), require(d, "ScoredItem", "x")),
        "ScoredItem.x is new, and required",
        False,
    ),
    "required now": (lambda d: require(d, "RecommendRequest", "k"), "RecommendRequest.k is required", True),
    "no longer always told": (
        lambda d: d["components"]["schemas"]["ScoredItem"]["required"].remove("score"),
        "ScoredItem.score is no longer always there",
        True,
    ),
    "value sent": (
        lambda d: fields(d, "RecommendRequest")["list"]["enum"].remove("again"),
        "RecommendRequest.list is no longer 'again'",
        True,
    ),
    "new value sent": (
        lambda d: fields(d, "RecommendRequest")["list"]["enum"].append("old"),
        "RecommendRequest.list may be 'old'",
        False,
    ),
    "value told": (
        lambda d: fields(d, "EventResult")["status"]["enum"].remove("late-queued"),
        "EventResult.status is no longer 'late-queued'",
        False,
    ),
    "new value told": (
        lambda d: fields(d, "EventResult")["status"]["enum"].append("lost"),
        "EventResult.status may be 'lost'",
        True,
    ),
    "type sent": (
        lambda d: fields(d, "EventMessage")["timestamp"].update(type="string"),
        "EventMessage.timestamp is no longer integer",
        True,
    ),
    "null sent no more": (
        lambda d: fields(d, "EventMessage")["value"]["anyOf"].pop(),
        "EventMessage.value is no longer null",
        True,
    ),
    "texts": (lambda d: fields(d, "EventMessage")["item_id"].update(description="x"), "texts or the version", False),
    "version": (lambda d: d["info"].update(version="99"), "texts or the version", False),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_breaks_clients_is_told_from_what_does_not(edit: str):
    make, what, breaks = EDITS[edit]
    old: Json = json.loads(json.dumps(openapi_document()))
    new = copy.deepcopy(old)
    make(new)
    assert Change(what, breaks) in changes(old, new)
    assert any(change.breaks for change in changes(old, new)) == breaks
    assert changes(old, old) == []
