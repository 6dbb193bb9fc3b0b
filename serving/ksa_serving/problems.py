"""Errors as RFC 9457 answers (`application/problem+json`), with stable codes."""

import logging
from http import HTTPStatus
from typing import Any, cast

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.types import Message, Send

from ksa_serving.errors import DeadlineError, NotOwnerError, OverloadedError, RateError, ServiceError
from ksa_serving.messages import Problem
from ksa_serving.metrics import Metrics

logger = logging.getLogger(__name__)
CODES = {404: "not-found", 405: "method-not-allowed", 413: "body-too-large"}


def problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> Response[bytes]:
    """Return the answer that says what went wrong."""
    body = Problem(f"urn:recsys-ksa:problem:{code}", HTTPStatus(status).phrase, status, detail, code)
    return Response(
        msgspec.json.encode(body), status_code=status, media_type="application/problem+json", headers=headers or {}
    )


def no_room() -> Response[bytes]:
    """Return the answer to a request that is one too many."""
    detail = "requests: as many are under way as can be answered soon. Try again in a second."
    return problem(503, OverloadedError.code, detail, {"retry-after": "1"})


def on_service_error(request: Request[Any, Any, Any], error: ServiceError) -> Response[bytes]:
    """Answer one of the service's own errors; those that pass ask to come back.

    Refusals for want of room or time, or for another process's users, are counted and not logged: under overload there
    would be a line a request.
    """
    return service_problem(error, request.app.state.service.metrics)


def service_problem(error: ServiceError, metrics: Metrics) -> Response[bytes]:
    """Return what `on_service_error` answers."""
    if isinstance(error, OverloadedError | DeadlineError | NotOwnerError | RateError):
        metrics.refused.labels(error.code).inc()
    elif error.status >= 500:
        logger.error("%s: %s", error.code, error)
    headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return problem(error.status, error.code, str(error), headers)


def on_http_error(_: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Answer what the web framework refused: no such path, wrong method, body too large."""
    headers = {name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"}
    return problem(error.status_code, CODES.get(error.status_code, "invalid-request"), error.detail, headers)


def on_any_error(_: Request[Any, Any, Any] | None, error: Exception) -> Response[bytes]:
    """Answer a mistake of ours. The traceback goes to the log; neither path nor body does, for they hold user ids."""
    logger.error("unhandled error", exc_info=error)
    return problem(500, "internal-error", "The service made a mistake; its log has the traceback.")


async def send_response(response: Response[bytes], send: Send) -> None:
    """Send a problem where no web framework does."""
    headers = [(name.encode(), value.encode()) for name, value in response.headers.items()]
    headers.append((b"content-type", b"application/problem+json"))
    await send_bytes(response.status_code or 500, headers, response.content, send)


async def send_bytes(status: int, headers: list[tuple[bytes, bytes]], content: bytes, send: Send) -> None:
    """Send an answer."""
    headers = [*headers, (b"content-length", b"%d" % len(content))]
    await send(cast(Message, {"type": "http.response.start", "status": status, "headers": headers}))
    await send(cast(Message, {"type": "http.response.body", "body": content, "more_body": False}))
