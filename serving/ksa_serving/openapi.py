"""`/openapi.json`: OpenAPI 3.1 generated from the structs that decode and encode.

`serving/openapi.json` is what was last reviewed; `python -m ksa_serving.openapi serving/openapi.json` renews it, and
says what changed and whether clients break.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ksa_serving import messages
from ksa_serving.openapi_changes import changes
from recsys_ksa import __version__


@dataclass(frozen=True)
class Operation:
    """One way to call the API. query: its optional query parameters and their types."""

    path: str
    method: str
    name: str
    summary: str
    asked: type | None
    answered: type
    query: tuple[tuple[str, str], ...] = ()


USER = "/v1/users/{user_id}"
OPERATIONS = (
    Operation(f"{USER}/events", "post", "keepEvents", "Keep events", messages.EventsRequest, messages.EventsAnswer),
    Operation(
        f"{USER}/events",
        "get",
        "getEvents",
        "Newest events, in order",
        None,
        messages.HistoryAnswer,
        (("limit", "integer"), ("before", "integer")),
    ),
    Operation(
        f"{USER}/events/{{event_id}}",
        "put",
        "correctEvent",
        "Put another payload in an event's place",
        messages.EventMessage,
        messages.EventsAnswer,
    ),
    Operation(
        f"{USER}/events/{{event_id}}", "delete", "retractEvent", "Take an event back", None, messages.EventsAnswer
    ),
    Operation(
        f"{USER}/recommend", "post", "recommend", "What next?", messages.RecommendRequest, messages.RecommendAnswer
    ),
    Operation(f"{USER}/score", "post", "score", "Score given items", messages.ScoreRequest, messages.ScoreAnswer),
    Operation(
        f"{USER}/explain", "post", "explain", "What carried a score", messages.ExplainRequest, messages.ExplainAnswer
    ),
    Operation(f"{USER}/state", "get", "state", "What is kept of a user", None, messages.StateAnswer),
    Operation(USER, "delete", "forget", "Delete a user", None, messages.ForgottenAnswer),
    Operation(
        "/v1/events:batch",
        "post",
        "keepEventsBatch",
        "Keep events of several users",
        messages.EventsBatchRequest,
        messages.EventsBatchAnswer,
    ),
    Operation(
        "/v1/recommend:batch",
        "post",
        "recommendBatch",
        "What next, for several users?",
        messages.RecommendBatchRequest,
        messages.RecommendBatchAnswer,
    ),
    Operation(
        "/v1/items",
        "get",
        "findItems",
        "Find items by id or title",
        None,
        messages.ItemsAnswer,
        (("text", "string"), ("most", "integer")),
    ),
    Operation("/v1/items:titles", "post", "titles", "Items' titles", messages.TitlesRequest, messages.ItemsAnswer),
    Operation("/livez", "get", "livez", "Whether the process lives", None, messages.HealthAnswer),
    Operation("/readyz", "get", "readyz", "Whether it can serve", None, messages.HealthAnswer),
)


def openapi_document(version: str = __version__) -> dict[str, Any]:
    """Return the API's description as JSON-ready values."""
    structs = {struct for op in OPERATIONS for struct in (op.asked, op.answered) if struct is not None}
    ordered = [*sorted(structs, key=lambda struct: struct.__name__), messages.Problem]
    references, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schema = dict(zip(ordered, references))
    paths: dict[str, dict[str, Any]] = {}
    for op in OPERATIONS:
        paths.setdefault(op.path, {})[op.method] = _operation(op, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "recsys-ksa", "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _operation(op: Operation, schema: dict[type, Any]) -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": schema[messages.Problem]}}
    operation: dict[str, Any] = {
        "summary": op.summary,
        "operationId": op.name,
        "responses": {
            "200": {"description": "Done", "content": {"application/json": {"schema": schema[op.answered]}}},
            "default": {"description": "Problem (RFC 9457)", "content": problem},
        },
    }
    if op.asked is not None:
        body = {"required": True, "content": {"application/json": {"schema": schema[op.asked]}}}
        operation["requestBody"] = body
    names = [name for name in ("user_id", "event_id") if f"{{{name}}}" in op.path]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": {"type": kind}} for name, kind in op.query
    ]
    if op.path.startswith("/v1/"):
        milliseconds = {"type": "integer", "minimum": 1}
        parameters.append({"name": "x-deadline-ms", "in": "header", "required": False, "schema": milliseconds})
        operation["parameters"] = parameters
    return operation


def review(path: Path) -> None:
    """Write the description to `path`; print how it differs from what was there."""
    new = msgspec.json.decode(msgspec.json.encode(openapi_document()))
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else new
    for change in changes(old, new):
        print(f"{'breaks clients' if change.breaks else 'breaks nobody'}: {change.what}")
    path.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    review(Path(sys.argv[1]))
