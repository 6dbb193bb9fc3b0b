"""What may come in: the one place that says why a user id, an event or a question is refused. Pure functions."""

import re
from collections.abc import Sequence

from ksa_serving.errors import InvalidRequestError
from ksa_serving.messages import EventMessage, ExplainRequest, RecommendRequest
from ksa_serving.release import Clock
from ksa_serving.settings import Limits

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MAX_TIME = 2**53
"""Times stay exact in every language that reads JSON, and far inside int64."""


def check_user_id(user_id: str, limits: Limits) -> None:
    """Refuse a user id that is empty, too long, or has control characters.

    Raises:
        InvalidRequestError: code `invalid-user-id`; the id itself is not repeated.
    """
    num_bytes = len(user_id.encode())
    if not 1 <= num_bytes <= limits.user_id_bytes:
        expected = f"expected 1 to {limits.user_id_bytes} bytes of UTF-8, got {num_bytes}"
        raise InvalidRequestError(f"user id: {expected}. Percent-encode one id in the path.", "invalid-user-id")
    if not _is_plain(user_id):
        raise InvalidRequestError("user id: expected no control characters, got one. Remove it.", "invalid-user-id")


def check_num_events(num_events: int, limits: Limits) -> None:
    """Refuse more events than one call may have.

    Raises:
        InvalidRequestError: code `too-many-events`.
    """
    _check_at_most(num_events, limits.events_per_call, "events")


def event_fault(event: EventMessage, limits: Limits, clock: Clock, now: float) -> str | None:
    """Return why this event cannot be kept, as a stable code, or None."""
    texts = (("item-id", event.item_id, limits.item_id_bytes),)
    if event.event_id is not None:
        texts += (("event-id", event.event_id, limits.event_id_bytes),)
    for name, text, most in texts:
        if not text:
            return f"empty-{name}"
        if len(text.encode()) > most:
            return f"{name}-too-long"
    if event.event_id is not None and not _is_plain(event.event_id):
        return "invalid-event-id"  # a NUL would sort it among events that have no id
    if event.event_type is not None and len(event.event_type.encode()) > limits.event_type_bytes:
        return "event-type-too-long"
    if event.timestamp < 0:
        return "negative-time"
    if event.timestamp >= MAX_TIME:
        return "time-out-of-range"
    if clock == "unix" and event.timestamp > now + limits.seconds_ahead:
        return "time-in-future"
    return None


def check_recommend(request: RecommendRequest, limits: Limits, clock: Clock, now: float) -> None:
    """Refuse a question whose values are out of range or contradict each other.

    Raises:
        InvalidRequestError: the message names the field.
    """
    if not 1 <= request.k <= limits.k:
        raise InvalidRequestError(f"k: expected 1 to {limits.k}, got {request.k}. Ask for fewer items.", "invalid-k")
    check_request_time(request.request_time, clock)
    check_candidates("allow", request.allow or [], limits)
    check_candidates("deny", request.deny, limits)
    if (request.which, request.exclude_seen) in (("again", True), ("new", False)):
        contradiction = f"list {request.which!r} contradicts exclude_seen {str(request.exclude_seen).lower()}"
        raise InvalidRequestError(f"list: {contradiction}. Leave exclude_seen out.", "contradiction")
    check_num_events(len(request.events), limits)
    for number, event in enumerate(request.events):
        fault = event_fault(event, limits, clock, now)
        if fault is not None:
            raise InvalidRequestError(f"events[{number}]: {fault}. Mend or leave out this event.", "invalid-event")


def check_request_time(request_time: object, clock: Clock) -> None:
    """Refuse a request time that is out of range, or where there is no clock.

    Raises:
        InvalidRequestError: code `invalid-request-time`.
    """
    if not isinstance(request_time, int):
        return
    if not 0 <= request_time < MAX_TIME:
        expected = "expected seconds from 0 to 2^53"
        raise InvalidRequestError(f"request_time: {expected}, got {request_time}.", "invalid-request-time")
    if clock == "ordinal":
        reason = "this run's data set has an order but no clock"
        raise InvalidRequestError(f"request_time: {reason}. Leave it out or send null.", "invalid-request-time")


def check_candidates(name: str, item_ids: Sequence[str], limits: Limits) -> None:
    """Refuse more items than one call may name.

    Raises:
        InvalidRequestError: code `too-many-items`.
    """
    _check_at_most(len(item_ids), limits.candidates, "items", name)


def check_num_users(num_users: int, limits: Limits) -> None:
    """Refuse more users than one batch call may have.

    Raises:
        InvalidRequestError: code `too-many-users`.
    """
    _check_at_most(num_users, limits.users_per_call, "users")


def check_told_users(told: Sequence[object], num_users: int) -> None:
    """Refuse to be told of more or fewer users than are asked about, unless of none.

    Raises:
        InvalidRequestError: code `invalid-users`.
    """
    if told and len(told) != num_users:
        expected = f"expected one object for each of {num_users} user_ids, or none at all, got {len(told)}"
        raise InvalidRequestError(f"users: {expected}.", "invalid-users")


def check_explain(request: ExplainRequest, limits: Limits) -> None:
    """Refuse to explain by more chunks than one call may.

    Raises:
        InvalidRequestError: code `invalid-chunks`.
    """
    if not 1 <= request.chunks <= limits.explained_chunks:
        expected = f"expected 1 to {limits.explained_chunks}, got {request.chunks}"
        raise InvalidRequestError(f"chunks: {expected}.", "invalid-chunks")


def _check_at_most(count: int, most: int, what: str, field: str | None = None) -> None:
    if count > most:
        expected = f"expected at most {most} {what} in one call, got {count}"
        raise InvalidRequestError(f"{field or what}: {expected}. Send fewer.", f"too-many-{what}")


def _is_plain(text: str) -> bool:
    """Return whether a text has no control characters."""
    return CONTROL.search(text) is None
