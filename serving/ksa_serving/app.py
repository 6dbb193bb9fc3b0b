"""HTTP around the service: routes, decoding, limits. Everything else is in `service.py`.

Paths are routed as they were sent, percent-encoded, so a user id may hold any character, also a slash; it is decoded
here, once, as strict UTF-8. Bodies are decoded strictly by msgspec whatever their content type says. A browser's
request that comes from another site is refused: the service listens on loopback, where any web page could reach it.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast
from urllib.parse import unquote_to_bytes, urlsplit

import msgspec
from litestar import Litestar, Request, Response, get, post
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.params import FromPath
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from ksa_serving.errors import InvalidRequestError, ServiceError
from ksa_serving.messages import EventsRequest, HealthAnswer, RecommendRequest
from ksa_serving.metrics import metrics_text
from ksa_serving.openapi import openapi_document
from ksa_serving.problems import on_any_error, on_http_error, on_service_error, problem
from ksa_serving.service import Service
from recsys_ksa import __version__

Asked = TypeVar("Asked")
AnyRequest = Request[Any, Any, State]
ROUTES = ("events", "recommend", "state", "livez", "readyz", "metrics", "openapi.json")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def create_app(service: Service, host: str = "127.0.0.1") -> ASGIApp:
    """Return the ASGI application of one service; its lifespan ends with the service closed.

    Args:
        host: where it listens; pages of this host and of loopback may call it from a browser.
    """
    requests: Counter[tuple[str, int]] = Counter()

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        yield
        await service.close()

    app = Litestar(
        [post_events, recommend, state, livez, readyz, metrics, openapi],
        state=State({"service": service, "requests": requests}),
        lifespan=[lifespan],
        openapi_config=None,
        logging_config=None,
        request_max_body_size=service.settings.limits.body_bytes,
        exception_handlers={
            ServiceError: on_service_error,
            HTTPException: on_http_error,
            Exception: on_any_error,
        },
    )
    bounded = _bound(_route_as_sent(cast(ASGIApp, app)), service.settings.concurrent_requests)
    guarded = _guard(bounded, (*LOOPBACK, host), service.settings.limits.header_bytes)
    return _count_requests(guarded, requests)


@post("/v1/users/{segment:str}/events", status_code=200)
async def post_events(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Keep events."""
    asked = await _body(request, EventsRequest)
    return _json(await _service(request).post_events(_user_id(segment), asked))


@post("/v1/users/{segment:str}/recommend", status_code=200)
async def recommend(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Answer "what next?"."""
    asked = await _body(request, RecommendRequest)
    return _json(await _service(request).recommend(_user_id(segment), asked))


@get("/v1/users/{segment:str}/state")
async def state(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Tell what is kept of a user."""
    return _json(await _service(request).state(_user_id(segment)))


@get("/livez")
async def livez() -> Response[bytes]:
    """Tell that the process lives; touches nothing."""
    return _json(HealthAnswer("ok"))


@get("/readyz")
async def readyz(request: AnyRequest) -> Response[bytes]:
    """Tell whether requests should come here."""
    reason = _service(request).unready()
    return _json(HealthAnswer("ok")) if reason is None else _json(HealthAnswer("unready", reason), status=503)


@get("/metrics")
async def metrics(request: AnyRequest) -> Response[str]:
    """Tell counters to Prometheus."""
    text = metrics_text(_service(request), request.app.state.requests)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@get("/openapi.json")
async def openapi() -> Response[bytes]:
    """Describe this API."""
    return _json(openapi_document(__version__))


def _service(request: AnyRequest) -> Service:
    return request.app.state.service


def _json(answer: object, status: int = 200) -> Response[bytes]:
    return Response(msgspec.json.encode(answer), status_code=status, media_type="application/json")


async def _body(request: AnyRequest, kind: type[Asked]) -> Asked:
    body = await request.body()
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"body: {error}. See /openapi.json.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"body: expected JSON in UTF-8, got: {error}.", "invalid-json") from error


def _user_id(segment: FromPath[str]) -> str:
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        detail = "user id: expected percent-encoded UTF-8 in the path, got other bytes. Encode it again."
        raise InvalidRequestError(detail, "invalid-user-id") from None


def _route_as_sent(app: ASGIApp) -> ASGIApp:
    """Route by the path as it was sent: servers give it decoded, where an encoded slash looks like a real one."""

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = cast(dict[str, Any], scope).get("raw_path") or scope["path"].encode()
            scope = cast(Scope, {**scope, "path": path.decode("latin-1")})
        await app(scope, receive, send)

    return routed


def _guard(app: ASGIApp, hosts: tuple[str, ...], header_bytes: int) -> ASGIApp:
    """Refuse too large headers, and what a browser sends for a page of another site; only browsers send `Origin`."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            origin = dict(scope["headers"]).get(b"origin")
            if sum(len(name) + len(value) for name, value in scope["headers"]) > header_bytes:
                detail = f"headers: expected at most {header_bytes} bytes in all. Send fewer."
                await _send(problem(431, "headers-too-large", detail), send)
            elif origin is not None and _host(origin) not in hosts:
                await _send(problem(403, "foreign-origin", "A page of another site may not call this service."), send)
            else:
                await app(scope, receive, send)
        else:
            await app(scope, receive, send)

    return guarded


def _bound(app: ASGIApp, most: int) -> ASGIApp:
    """Refuse users' requests beyond `most` at once, with a word on when to come back; health is always told."""
    under_way = 0

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal under_way
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await app(scope, receive, send)
        elif under_way >= most:
            detail = f"requests: at most {most} are answered at once. Try again in a second."
            await _send(problem(503, "overloaded", detail, {"retry-after": "1"}), send)
        else:
            under_way += 1
            try:
                await app(scope, receive, send)
            finally:
                under_way -= 1

    return bounded


def _host(origin: bytes) -> str | None:
    try:
        return urlsplit(origin.decode("latin-1")).hostname
    except ValueError:
        return None


async def _send(response: Response[bytes], send: Callable[[Message], Awaitable[None]]) -> None:
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(response.content))]
    headers += [(name.encode(), value.encode()) for name, value in response.headers.items()]
    start = {"type": "http.response.start", "status": response.status_code, "headers": headers}
    await send(cast(Message, start))
    await send(cast(Message, {"type": "http.response.body", "body": response.content, "more_body": False}))


def _count_requests(app: ASGIApp, requests: Counter[tuple[str, int]]) -> ASGIApp:
    """Count answers by route and status; the route is its last word, never the path, which holds a user id."""

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        last = scope["path"].rstrip("/").rsplit("/", 1)[-1]
        route = last if last in ROUTES else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                requests[route, message["status"]] += 1
            await send(message)

        await app(scope, receive, counting)

    return counted
