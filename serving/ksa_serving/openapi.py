"""`/openapi.json`: OpenAPI 3.1 generated from the structs that decode and encode."""

from typing import Any

import msgspec

from ksa_serving import messages

OPERATIONS: tuple[tuple[str, str, str, type | None, type], ...] = (
    ("/v1/users/{user_id}/events", "post", "Keep events", messages.EventsRequest, messages.EventsAnswer),
    ("/v1/users/{user_id}/recommend", "post", "What next?", messages.RecommendRequest, messages.RecommendAnswer),
    ("/v1/users/{user_id}/state", "get", "What is kept of a user", None, messages.StateAnswer),
    ("/livez", "get", "Whether the process lives", None, messages.HealthAnswer),
    ("/readyz", "get", "Whether it can serve", None, messages.HealthAnswer),
)


def openapi_document(version: str) -> dict[str, Any]:
    """Return the API's description as JSON-ready values."""
    structs = {struct for *_, asked, answered in OPERATIONS for struct in (asked, answered) if struct is not None}
    ordered = [*sorted(structs, key=lambda struct: struct.__name__), messages.Problem]
    references, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schema = dict(zip(ordered, references))
    paths: dict[str, dict[str, Any]] = {}
    for path, method, summary, asked, answered in OPERATIONS:
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": path.strip("/").split("/")[-1],
            "responses": {
                "200": {"description": "Done", "content": {"application/json": {"schema": schema[answered]}}},
                "default": {
                    "description": "Problem (RFC 9457)",
                    "content": {"application/problem+json": {"schema": schema[messages.Problem]}},
                },
            },
        }
        if asked is not None:
            body = {"required": True, "content": {"application/json": {"schema": schema[asked]}}}
            operation["requestBody"] = body
        if "{user_id}" in path:
            user_id = {"name": "user_id", "in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [user_id]
        paths[path] = {method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "recsys-ksa", "version": version},
        "paths": paths,
        "components": {"schemas": components},
    }
