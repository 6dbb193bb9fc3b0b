"""The two calls that come most often, answered past the web framework, which took most of their time.

`POST /v1/users/{id}/events` and `/recommend` are decoded, answered and refused as `app.py` does; all else goes there.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from litestar.types import ASGIApp, Receive, Scope, Send

from ksa_serving.context import Context
from ksa_serving.decoding import decoded, text_of
from ksa_serving.errors import ServiceError
from ksa_serving.messages import EventsRequest, RecommendRequest
from ksa_serving.problems import on_any_error, send_bytes, send_response, service_problem
from ksa_serving.service import Service

Call = tuple[type[Any], Callable[[str, Any, Context], Awaitable[object]]]
JSON = [(b"content-type", b"application/json")]


def quick(app: ASGIApp, service: Service) -> ASGIApp:
    """Return `app` with a quicker way to the two calls."""
    limits = service.settings.limits
    calls: dict[str, Call] = {
        "events": (EventsRequest, service.events.post),
        "recommend": (RecommendRequest, service.questions.recommend),
    }

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        asked: Any = scope
        parts = asked["path"].split("/") if asked["type"] == "http" and asked["method"] == "POST" else []
        call = calls.get(parts[4]) if len(parts) == 5 and parts[1:3] == ["v1", "users"] and parts[3] else None
        if call is None:
            await app(scope, receive, send)
            return
        try:
            message: Any = await receive()
            body = message["body"]  # whole: `guards.py` has read it
            kind, answer = call
            user_id, context = text_of(parts[3]), asked["ksa"]
            if kind is EventsRequest:  # who sends too many is refused before they are decoded
                service.events.check_rate(context.owner(user_id, limits))
            content = msgspec.json.encode(await answer(user_id, decoded(body, kind), context))
        except ServiceError as error:
            await send_response(service_problem(error, service.metrics), send)
        except Exception as error:
            await send_response(on_any_error(None, error), send)
        else:
            await send_bytes(200, JSON, content, send)

    return routed
