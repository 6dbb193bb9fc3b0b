"""What stands before the routes: counting, header size, foreign pages, who may do what, rates, deadlines, bodies."""

import math
import time
from collections.abc import Awaitable
from contextlib import suppress
from itertools import chain
from typing import Any, cast
from urllib.parse import urlsplit

from litestar import Response
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from ksa_serving.auth import Caller, Tokens, TokenScope, open_door
from ksa_serving.buckets import Buckets
from ksa_serving.context import Context
from ksa_serving.errors import InvalidRequestError
from ksa_serving.problems import no_room, problem, send_response
from ksa_serving.room import ENTERED, Room
from ksa_serving.service import Service
from ksa_serving.shards import Edge

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/livez", "/readyz", "/openapi.json", "/", "/page.js", "/page.css")
"""Paths that need no token: they tell nothing of anyone."""
ROUTES = frozenset(
    {
        *("events", "recommend", "score", "explain", "state", "users", "events:batch", "recommend:batch"),
        *("items", "items:titles", "livez", "readyz", "metrics", "openapi.json", "page"),
        *("releases", "load", "activate", "rollback", "drain"),
        *("shards", "export", "import", "tally", "release"),
    }
)
MAX_DEADLINE_MS = 600_000


def guard(app: ASGIApp, service: Service, host: str, tokens: Tokens | None, admin_port: int | None) -> ASGIApp:
    """Return `app` behind all guards; see `create_app` for the arguments."""
    gate = _Gate(app, service, (*LOOPBACK, host), tokens, admin_port)
    metrics = service.metrics

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        """Count answers by route and status; the route is one of a fixed set, never the path, which holds a user id."""
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        began = time.perf_counter()
        asked: dict[str, Any] = {**scope}  # its own: the gate adds to it
        path = asked["path"] = (asked.get("raw_path") or asked["path"].encode()).decode("latin-1")  # %2F is no slash
        route = route_of(path)

        def counting(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                metrics.requests.labels(route, str(message["status"])).inc()
                metrics.seconds.labels(route).observe(time.perf_counter() - began)
            return send(message)

        with suppress(ConnectionAbortedError):
            await gate(asked, receive, counting, scope_of(asked["method"], path, route))

    return counted


def route_of(path: str) -> str:
    """Return the name under which a path is counted."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["v1", "users"]:
        name = parts[3] if len(parts) > 3 else "users"
    else:
        name = "page" if path in OPEN[3:] else parts[-1]
    return name if name in ROUTES else "other"


def scope_of(method: str, path: str, route: str) -> TokenScope:
    """Return what a caller must be allowed to do for this request."""
    if path.startswith("/admin/"):
        return "admin"
    if method == "DELETE":
        return "delete"
    if method == "PUT" or (method == "POST" and route in ("events", "events:batch")):
        return "ingest"
    if path.startswith("/v1/users/") and route in ("events", "state", "explain"):
        return "inspect"
    return "read"


class _Gate:
    """Lets a request in, or answers why not."""

    def __init__(
        self, app: ASGIApp, service: Service, hosts: tuple[str, ...], tokens: Tokens | None, admin_port: int | None
    ):
        self._app = app
        self._hosts = hosts
        self._tokens = tokens
        self._admin_port = admin_port
        self._header_bytes = service.settings.limits.header_bytes
        self._body_bytes = service.settings.limits.body_bytes
        self._rooms = service.rooms
        self._refused = service.metrics.refused
        rate = service.settings.requests_per_second
        self._rate = Buckets[str](rate, max(1.0, 2 * rate)) if rate else None
        self._log = service.log

    async def __call__(self, asked: dict[str, Any], receive: Receive, send: Send, needed: TokenScope) -> None:
        room = asked.get(ENTERED)
        try:
            await self._checked(asked, receive, send, needed, room)
        finally:
            if room is not None:
                room.leave()

    async def _checked(
        self, asked: dict[str, Any], receive: Receive, send: Send, needed: TokenScope, entered: Room | None
    ) -> None:
        headers = dict(asked["headers"])
        refusal = self._stranger(asked, headers)
        if refusal is not None:
            await send_response(refusal, send)
            return
        path = asked["path"]
        caller = self._caller(asked, headers)
        if path not in OPEN:
            refusal = self._unwelcome(needed, path, caller)
            if refusal is not None:
                await send_response(refusal, send)
                return
        try:
            context = asked["ksa"] = Context(
                tenant=caller.tenant if caller else "",
                deadline=_deadline(headers),
                ownership=self._log.ownership,
                writing=needed in ("ingest", "delete"),
                edge=_edge(headers),
                inspecting=caller is not None and "inspect" in caller.scopes,
            )
        except InvalidRequestError as error:
            await send_response(problem(error.status, error.code, str(error)), send)
            return
        scope = cast(Scope, asked)
        if not path.startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive, self._body_bytes)
        if body is None:
            detail = f"body: expected at most {self._body_bytes} bytes, got more. Send less in one call."
            await send_response(problem(413, "body-too-large", detail), send)
        elif entered is not None:
            await self._app(scope, _read_already(body, receive), send)
        else:
            room = self._rooms.writing if context.writing else self._rooms.asking
            if not room.enter():
                self._refused.labels("overloaded").inc()
                await send_response(no_room(), send)
                return
            try:
                await self._app(scope, _read_already(body, receive), send)
            finally:
                room.leave()

    def _stranger(self, asked: dict[str, Any], headers: dict[bytes, bytes]) -> Response[bytes] | None:
        """Refuse too large headers, what a browser sends for a page of another site, and admin on the open port."""
        if sum(map(len, chain.from_iterable(asked["headers"]))) > self._header_bytes:
            detail = f"headers: expected at most {self._header_bytes} bytes in all. Send fewer."
            return problem(431, "headers-too-large", detail)
        origin = headers.get(b"origin")
        if origin is not None and _host(origin) not in self._hosts:  # only browsers send it
            return problem(403, "foreign-origin", "A page of another site may not call this service.")
        server = asked.get("server")
        on_admin = self._admin_port is not None and server is not None and server[1] == self._admin_port
        if asked["path"].startswith("/admin/") != on_admin and asked["path"] not in ("/livez", "/metrics"):
            return problem(404, "not-found", "Not Found")
        return None

    def _caller(self, asked: dict[str, Any], headers: dict[bytes, bytes]) -> Caller | None:
        if self._tokens is not None:
            return self._tokens.caller(headers.get(b"authorization", b"").decode("latin-1"))
        client = asked.get("client")
        return open_door(client[0] if client else "")

    def _unwelcome(self, needed: TokenScope, path: str, caller: Caller | None) -> Response[bytes] | None:
        if caller is None:
            detail = "token: expected `Authorization: Bearer TOKEN` with a token of --tokens, got none of them."
            return problem(401, "unauthorized", detail, {"www-authenticate": "Bearer"})
        if needed not in caller.scopes:
            return problem(403, "forbidden", f"token: expected the scope {needed}, which this token has not.")
        if self._rate is not None and path.startswith("/v1/") and (wait := self._rate.take(caller.name)):
            self._refused.labels("rate-limited").inc()
            headers = {"retry-after": str(math.ceil(wait))}
            return problem(429, "rate-limited", "requests: too many from this client. Slow down.", headers)
        return None


async def _read_body(receive: Receive, most: int) -> bytes | None:
    """Return a request's body; None where it has more than `most` bytes, which are not all read then.

    Raises:
        ConnectionAbortedError: the caller has gone.
    """
    body = b""
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionAbortedError("the caller has gone")
        part = message.get("body", b"")
        body = body + part if body else part
        if len(body) > most:
            return None
        if not message.get("more_body", False):
            return body


def _read_already(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that has the whole body at once."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def received() -> Any:
        return next(messages, None) or await receive()

    return received


def _deadline(headers: dict[bytes, bytes]) -> float | None:
    """Return when the caller stops waiting, on `time.monotonic`'s clock; None where they did not say."""
    value = headers.get(b"x-deadline-ms")
    if value is None:
        return None
    if not (value.isdigit() and len(value) < 10 and 1 <= int(value) <= MAX_DEADLINE_MS):
        detail = f"x-deadline-ms: expected 1 to {MAX_DEADLINE_MS}, got something else."
        raise InvalidRequestError(detail, "invalid-deadline")
    return time.monotonic() + int(value) / 1000


def _edge(headers: dict[bytes, bytes]) -> Edge | None:
    """Return what the proxy says of the user; None where none stands before this process."""
    shard, epoch = headers.get(b"x-ksa-shard"), headers.get(b"x-ksa-epoch")
    if shard is None and epoch is None:
        return None
    if shard is None or epoch is None or not (_is_number(shard) and _is_number(epoch)):
        detail = "x-ksa-shard, x-ksa-epoch: expected two whole numbers, got something else. Mend the proxy."
        raise InvalidRequestError(detail, "invalid-edge")
    return Edge(int(shard), int(epoch))


def _is_number(value: bytes) -> bool:
    return value.isdigit() and len(value) < 10


def _host(origin: bytes) -> str | None:
    try:
        return urlsplit(origin.decode("latin-1")).hostname
    except ValueError:
        return None
