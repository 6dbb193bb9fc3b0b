"""HTTP around the service: routes and decoding. The guards before it are in `guards.py`, all else in `service.py`.

Paths are routed as they were sent, percent-encoded, so a user id may hold any character, also a slash; it is decoded
here, once, as strict UTF-8. Bodies are decoded strictly by msgspec whatever their content type says.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, TypeVar

import msgspec
from litestar import Litestar, Request, Response, delete, get, post, put
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.params import FromPath
from litestar.types import ASGIApp

from ksa_serving.auth import Tokens
from ksa_serving.context import Context
from ksa_serving.decoding import decoded, text_of
from ksa_serving.errors import InvalidRequestError, ServiceError
from ksa_serving.guards import guard
from ksa_serving.messages import (
    EventMessage,
    EventsBatchRequest,
    EventsRequest,
    ExplainRequest,
    ExportRequest,
    HealthAnswer,
    LoadRequest,
    RecommendBatchRequest,
    RecommendRequest,
    ScoreRequest,
    TallyRequest,
    TitlesRequest,
)
from ksa_serving.openapi import openapi_document
from ksa_serving.problems import on_any_error, on_http_error, on_service_error
from ksa_serving.quick_routes import quick
from ksa_serving.service import Service
from ksa_serving.shard_rows import Page
from ksa_serving.shards import Ownership
from recsys_ksa import __version__

Asked = TypeVar("Asked")
AnyRequest = Request[Any, Any, State]
MAX_PAGE_BYTES = 16 * 1024**2
"""Of users on their way: PAGE_ROWS rows of the longest ids take 3 MiB."""
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


def create_app(
    service: Service, host: str = "127.0.0.1", tokens: Tokens | None = None, admin_port: int | None = None
) -> ASGIApp:
    """Return the ASGI application of one service; its lifespan ends with the service closed.

    Args:
        host: where it listens; pages of this host and of loopback may call it from a browser.
        tokens: who may do what; None: whoever reaches it, as is right on loopback only.
        admin_port: the listener on which alone releases are changed; None: nowhere.
    """

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        service.upkeep.purge()  # of what a crash left
        yield
        await service.close()

    app = Litestar(
        [
            *(post_events, get_events, put_event, delete_event, recommend, score, explain, state, delete_user),
            *(post_events_batch, recommend_batch, find_items, titles, livez, readyz, metrics, openapi, page),
            *(releases, load, activate, rollback, drain),
            *(get_shards, put_shards, export_users, import_users, tally, release_users),
        ],
        state=State({"service": service}),
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
    return guard(quick(app, service), service, host, tokens, admin_port)


@post("/v1/users/{segment:str}/events", status_code=200)
async def post_events(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Keep events."""
    asked = await _body(request, EventsRequest)
    return _json(await _service(request).events.post(text_of(segment), asked, _context(request)))


@get("/v1/users/{segment:str}/events")
async def get_events(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Return a user's newest events."""
    limit, before = _number(request, "limit", 1000), _number(request, "before", None)
    history = await _service(request).events.history(text_of(segment), limit or 0, before, _context(request))
    return _json(history)


@put("/v1/users/{segment:str}/events/{event_id:str}", status_code=200)
async def put_event(request: AnyRequest, segment: FromPath[str], event_id: FromPath[str]) -> Response[bytes]:
    """Correct an event."""
    asked = await _body(request, EventMessage)
    service = _service(request)
    return _json(await service.events.correct(text_of(segment), text_of(event_id), asked, _context(request)))


@delete("/v1/users/{segment:str}/events/{event_id:str}", status_code=200)
async def delete_event(request: AnyRequest, segment: FromPath[str], event_id: FromPath[str]) -> Response[bytes]:
    """Take an event back."""
    return _json(await _service(request).events.retract(text_of(segment), text_of(event_id), _context(request)))


@post("/v1/users/{segment:str}/recommend", status_code=200)
async def recommend(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Answer "what next?"."""
    asked = await _body(request, RecommendRequest)
    return _json(await _service(request).questions.recommend(text_of(segment), asked, _context(request)))


@post("/v1/users/{segment:str}/score", status_code=200)
async def score(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Score given items."""
    asked = await _body(request, ScoreRequest)
    return _json(await _service(request).questions.score(text_of(segment), asked, _context(request)))


@post("/v1/users/{segment:str}/explain", status_code=200)
async def explain(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Tell what carried an item's score."""
    asked = await _body(request, ExplainRequest)
    return _json(await _service(request).questions.explain(text_of(segment), asked, _context(request)))


@get("/v1/users/{segment:str}/state")
async def state(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Tell what is kept of a user."""
    return _json(await _service(request).questions.state(text_of(segment), _context(request)))


@delete("/v1/users/{segment:str}", status_code=200)
async def delete_user(request: AnyRequest, segment: FromPath[str]) -> Response[bytes]:
    """Delete a user."""
    return _json(await _service(request).events.forget(text_of(segment), _context(request)))


@post("/v1/events:batch", status_code=200)
async def post_events_batch(request: AnyRequest) -> Response[bytes]:
    """Keep events of several users."""
    asked = await _body(request, EventsBatchRequest)
    return _json(await _service(request).events.post_batch(asked, _context(request)))


@post("/v1/recommend:batch", status_code=200)
async def recommend_batch(request: AnyRequest) -> Response[bytes]:
    """Answer "what next?" for several users."""
    asked = await _body(request, RecommendBatchRequest)
    return _json(await _service(request).questions.recommend_batch(asked, _context(request)))


@get("/v1/items")
async def find_items(request: AnyRequest) -> Response[bytes]:
    """Find items by id or title."""
    text = request.query_params.get("text", "")
    return _json(await _service(request).questions.find_items(text, _number(request, "most", 10) or 0))


@post("/v1/items:titles", status_code=200)
async def titles(request: AnyRequest) -> Response[bytes]:
    """Return items' titles."""
    return _json(_service(request).questions.titles((await _body(request, TitlesRequest)).item_ids))


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
async def metrics(request: AnyRequest) -> Response[bytes]:
    """Tell counters to Prometheus."""
    return Response(await _service(request).told_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


@get("/openapi.json")
async def openapi() -> Response[bytes]:
    """Describe this API."""
    return _json(openapi_document(__version__))


@get(list(PAGE))
async def page(request: AnyRequest) -> Response[bytes]:
    """Show the page for people; it loads nothing from elsewhere."""
    name, kind = PAGE[request.scope["path"]]
    headers = {
        "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "cache-control": "no-cache",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    content = (files("ksa_serving") / "page" / name).read_bytes()
    return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)


@get("/admin/releases")
async def releases(request: AnyRequest) -> Response[bytes]:
    """List the releases loaded."""
    return _json(_service(request).operator.list())


@post("/admin/load", status_code=200)
async def load(request: AnyRequest) -> Response[bytes]:
    """Load a release and warm it."""
    return _json(await _service(request).operator.load((await _body(request, LoadRequest)).run))


@post("/admin/activate", status_code=200)
async def activate(request: AnyRequest) -> Response[bytes]:
    """Serve a loaded release."""
    return _json(await _service(request).operator.activate((await _body(request, LoadRequest)).run))


@post("/admin/rollback", status_code=200)
async def rollback(request: AnyRequest) -> Response[bytes]:
    """Serve the previous release again."""
    return _json(await _service(request).operator.roll_back())


@post("/admin/drain", status_code=200)
async def drain(request: AnyRequest) -> Response[bytes]:
    """Turn unready, so that a proxy sends no more; requests are still answered."""
    return _json(_service(request).operator.drain())


@get("/admin/shards")
async def get_shards(request: AnyRequest) -> Response[bytes]:
    """Tell which users are this process's."""
    return _json(await _service(request).shards.owned())


@put("/admin/shards", status_code=200)
async def put_shards(request: AnyRequest) -> Response[bytes]:
    """Tell this process which users are its own."""
    return _json(await _service(request).shards.own(await _body(request, Ownership)))


@post("/admin/shards/export", status_code=200)
async def export_users(request: AnyRequest) -> Response[bytes]:
    """Read a part of the users on their way to another process, as MessagePack."""
    page = await _service(request).shards.export(await _body(request, ExportRequest))
    return Response(msgspec.msgpack.encode(page), media_type="application/msgpack")


@post("/admin/shards/import", status_code=200, request_max_body_size=MAX_PAGE_BYTES)
async def import_users(request: AnyRequest) -> Response[bytes]:
    """Keep a part of the users on their way here."""
    try:
        page = msgspec.msgpack.decode(await request.body(), type=Page)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"body: expected a page of /admin/shards/export, got: {error}.") from error
    return _json(await _service(request).shards.keep(page))


@post("/admin/shards/tally", status_code=200)
async def tally(request: AnyRequest) -> Response[bytes]:
    """Count what is kept of some virtual shards."""
    return _json(await _service(request).shards.tally((await _body(request, TallyRequest)).virtual_shards))


@post("/admin/shards/release", status_code=200)
async def release_users(request: AnyRequest) -> Response[bytes]:
    """Take out some users who are another process's."""
    return _json(await _service(request).shards.release())


def _service(request: AnyRequest) -> Service:
    return request.app.state.service


def _context(request: AnyRequest) -> Context:
    """Return what `guards.py` found out about the caller and the deadline."""
    return request.scope["ksa"]  # type: ignore[typeddict-item]


def _json(answer: object, status: int = 200) -> Response[bytes]:
    return Response(msgspec.json.encode(answer), status_code=status, media_type="application/json")


async def _body(request: AnyRequest, kind: type[Asked]) -> Asked:
    return decoded(await request.body(), kind)


def _number(request: AnyRequest, name: str, default: int | None) -> int | None:
    value = request.query_params.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) < 16):
        raise InvalidRequestError(f"{name}: expected a whole number, got another text.", f"invalid-{name}")
    return int(value)
