"""The wire: what requests and answers look like. Unknown fields and wrong types are refused by name.

These structs are the only place where a field of the API is defined: bodies are decoded into them, answers are
encoded from them, and `/openapi.json` is generated from them. Forms are those of the project's fixed names.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

EventStatus = Literal["accepted", "duplicate", "late-applied", "late-queued", "rejected"]
ItemList = Literal["all", "again", "new"]
StateSource = Literal["host", "rebuilt", "none"]


class EventMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """One interaction of the user in the path."""

    item_id: Annotated[str, Meta(description="Any string; items the model does not know are kept too.")]
    timestamp: Annotated[int, Meta(description="Unix seconds (or the data set's own clock).")]
    event_id: Annotated[
        str | None,
        Meta(description="Makes sending again harmless. Sortable ids (ULID) keep same-second events in order."),
    ] = None
    event_type: str | None = None
    value: float | None = None


class EventsRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Events to keep."""

    events: list[EventMessage]


class EventResult(Struct, frozen=True):
    """What became of one event, in the order sent."""

    status: EventStatus
    reason: str | None = None


class EventsAnswer(Struct, frozen=True):
    """All that is not `rejected` is on disk. Every later answer that reached `seq` knows these events."""

    results: list[EventResult]
    seq: int


class RecommendRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """What to recommend. `events` serve this answer only and are not kept."""

    k: Annotated[int, Meta(description="Items wanted.")] = 10
    request_time: Annotated[
        int | UnsetType | None,
        Meta(description="Unix seconds; missing: the server's clock where the data set's clock is unix; null: none."),
    ] = UNSET
    exclude_seen: Annotated[bool | None, Meta(description="Leave out items the user had; missing: as the run.")] = None
    which: Annotated[ItemList, Meta(description="again: only items the user had; new: only others.")] = field(
        default="all", name="list"
    )
    events: list[EventMessage] = []


class ScoredItem(Struct, frozen=True):
    """One recommended item."""

    item_id: str
    score: float


class RecommendAnswer(Struct, frozen=True):
    """Recommended items, best first, and exactly which model, index and state they come from."""

    items: list[ScoredItem]
    num_events: Annotated[int, Meta(description="Events this answer knows, those of the request included.")]
    model_version: str
    index_version: str
    seq: Annotated[int, Meta(description="Last sequence number kept for this user.")]
    state_seq: Annotated[int, Meta(description="Last sequence number this answer knows.")]
    state_source: Annotated[
        StateSource, Meta(description="host: held in memory; rebuilt: from the event log; none: no events kept.")
    ]
    request_time: int | None
    beyond_trained_length: Annotated[bool, Meta(description="The history is longer than any the model trained on.")]
    degraded: bool = False


class StateAnswer(Struct, frozen=True):
    """What is kept of a user: `num_events` and `seq` from the event log, the rest from the state held in memory."""

    num_events: int
    seq: int
    state_source: StateSource
    state_seq: int
    nbytes: Annotated[int, Meta(description="Keys and values, bytes.")]
    seen_nbytes: int
    fixed_nbytes: int
    model_version: str
    index_version: str
    state_fingerprint: str


class HealthAnswer(Struct, frozen=True):
    """Whether this process lives, or is ready, and if not why."""

    status: Literal["ok", "unready"]
    reason: str | None = None


class Problem(Struct, frozen=True):
    """An error, as RFC 9457 says; `code` is stable, `detail` is for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
