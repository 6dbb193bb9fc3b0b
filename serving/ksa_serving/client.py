"""A typed client of the service.

    with Client("http://127.0.0.1:8000") as client:
        client.keep("ann", [EventMessage("milk", 1_700_000_000, event_id="01HF7")])
        client.recommend("ann", k=10).items

Calls that were refused for want of room (429, 503) or cut off are sent again: events are known by their ids, or by
their content, so none is kept twice.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from ksa_serving.errors import ClientError
from ksa_serving.messages import (
    EventMessage,
    EventsAnswer,
    EventsBatchAnswer,
    ExplainAnswer,
    ForgottenAnswer,
    HistoryAnswer,
    Problem,
    RecommendAnswer,
    RecommendBatchAnswer,
    ScoreAnswer,
    StateAnswer,
)

Answer = TypeVar("Answer")


class Client:
    """Calls one service, or the proxy before several.

    Args:
        url: without a path.
        token: sent as a bearer token.
        timeout: of one try, in seconds.
        tries: of one call.

    Raises:
        ClientError: the url is none, or the token.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, tries: int = 5):
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL:
            address = httpx.URL()
        if address.scheme not in ("http", "https") or not address.host:
            raise ClientError(f"url: expected one as http://127.0.0.1:8000, got {url!r}.", refused=True)
        self._http = httpx.Client(base_url=address, headers=authorization(token), timeout=timeout)
        self._tries = tries
        self._sleep: Callable[[float], None] = time.sleep

    def keep(self, user_id: str, events: Sequence[EventMessage]) -> EventsAnswer:
        """Keep events; they are on disk when this returns."""
        return self._post(user_path(user_id, "events"), {"events": events}, EventsAnswer)

    def keep_batch(self, events: Mapping[str, Sequence[EventMessage]]) -> EventsBatchAnswer:
        """Keep events of several users."""
        users = [{"user_id": user_id, "events": given} for user_id, given in events.items()]
        return self._post("/v1/events:batch", {"users": users}, EventsBatchAnswer)

    def correct(self, user_id: str, event: EventMessage) -> EventsAnswer:
        """Put `event` in place of the one that has its id."""
        path = f"{user_path(user_id, 'events')}/{quote(event.event_id or '', safe='')}"
        return self._call("PUT", path, event, EventsAnswer)

    def retract(self, user_id: str, event_id: str) -> EventsAnswer:
        """Take an event back."""
        return self._call("DELETE", f"{user_path(user_id, 'events')}/{quote(event_id, safe='')}", None, EventsAnswer)

    def history(self, user_id: str, limit: int = 1000) -> HistoryAnswer:
        """Return a user's newest events."""
        return self._call("GET", f"{user_path(user_id, 'events')}?limit={limit}", None, HistoryAnswer)

    def recommend(self, user_id: str, **fields: Any) -> RecommendAnswer:
        """Ask what is next; `fields` are those of `RecommendRequest`."""
        return self._post(user_path(user_id, "recommend"), fields, RecommendAnswer)

    def recommend_batch(self, user_ids: Sequence[str], **fields: Any) -> RecommendBatchAnswer:
        """Ask what is next for several users."""
        return self._post("/v1/recommend:batch", {"user_ids": user_ids, **fields}, RecommendBatchAnswer)

    def score(self, user_id: str, item_ids: Sequence[str], **fields: Any) -> ScoreAnswer:
        """Score given items."""
        return self._post(user_path(user_id, "score"), {"item_ids": item_ids, **fields}, ScoreAnswer)

    def explain(self, user_id: str, item_id: str, **fields: Any) -> ExplainAnswer:
        """Ask what carried an item's score."""
        return self._post(user_path(user_id, "explain"), {"item_id": item_id, **fields}, ExplainAnswer)

    def state(self, user_id: str) -> StateAnswer:
        """Ask what is kept of a user."""
        return self._call("GET", user_path(user_id, "state"), None, StateAnswer)

    def forget(self, user_id: str) -> ForgottenAnswer:
        """Delete a user."""
        return self._call("DELETE", user_path(user_id), None, ForgottenAnswer)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        """Return this client; leaving closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self.close()

    def _post(self, path: str, body: object, kind: type[Answer]) -> Answer:
        return self._call("POST", path, body, kind)

    def _call(self, method: str, path: str, body: object, kind: type[Answer]) -> Answer:
        """Return the answer.

        Raises:
            ClientError: the service refused the call, or could not be reached in all tries.
        """
        content = None if body is None else msgspec.json.encode(body)
        reason, refused, told = "", False, 0.0
        for turn in range(self._tries):
            if turn:
                self._sleep(max(told, min(2.0, 0.1 * 2**turn)))
            try:
                response = self._http.request(method, path, content=content)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}. Is a service there? Start it, or name another url."
                continue
            if response.status_code == 200:
                return msgspec.json.decode(response.content, type=kind)
            reason = _detail(response)
            seconds = response.headers.get("retry-after", "")
            told = float(seconds) if response.status_code == 429 and seconds.isdigit() else 0.0
            if response.status_code not in (429, 503):
                refused = response.status_code in (400, 404, 413, 431)
                break
        raise ClientError(f"{method} {self._http.base_url}: expected an answer, got: {reason}", refused)


def authorization(token: str | None) -> dict[str, str]:
    """Return the header that carries a bearer token.

    Raises:
        ClientError: the token, which is not shown, cannot be one.
    """
    if token is None:
        return {}
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise ClientError("token: expected visible ASCII without spaces, got something else.", refused=True)
    return {"authorization": f"Bearer {token}"}


def user_path(user_id: str, verb: str = "") -> str:
    """Return a user's path; an id of dots alone would be taken for a relative path, so dots are encoded too.

    Raises:
        ClientError: the id is empty, or no text.
    """
    try:
        segment = quote(user_id.encode(), safe="").replace(".", "%2E")
    except UnicodeEncodeError:
        segment = ""
    if not segment:
        raise ClientError(f"user id: expected text of UTF-8, got {user_id!r}.", refused=True)
    return f"/v1/users/{segment}/{verb}".rstrip("/")


def _detail(response: httpx.Response) -> str:
    try:
        problem = msgspec.json.decode(response.content, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"{response.status_code} {response.reason_phrase}"
    return f"{problem.status} {problem.code}: {problem.detail}"
