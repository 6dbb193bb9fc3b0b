"""The wire: what requests and answers look like. Unknown fields and wrong types are refused by name.

These structs are the only place where a field of the API is defined: bodies are decoded into them, answers are
encoded from them, and `/openapi.json` is generated from them. Forms are those of the project's fixed names.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from ksa_serving.shard_rows import Cursor
from ksa_serving.shards import Ownership

EventStatus = Literal["accepted", "duplicate", "late-applied", "late-queued", "rejected"]
ItemList = Literal["all", "again", "new"]
Parity = Literal["exact", "int8"]
StateTier = Literal["gpu", "host"]
StateSource = Literal["gpu", "host", "store", "rebuilt", "none", "degraded"]


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


class UserEvents(Struct, frozen=True, forbid_unknown_fields=True):
    """Events of one user of several."""

    user_id: str
    events: list[EventMessage]


class EventsBatchRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Events of several users."""

    users: list[UserEvents]


class EventsBatchAnswer(Struct, frozen=True):
    """One answer a user, in the order sent."""

    answers: list[EventsAnswer]


class KeptEvent(Struct, frozen=True):
    """An event as the log has it. `index` counts from the user's first event; `chunk` is index // chunk_size."""

    index: int
    chunk: int
    item_id: str
    timestamp: int
    event_id: str | None
    event_type: str | None
    value: float | None
    title: str | None


class HistoryAnswer(Struct, frozen=True):
    """The newest events of a user, in order, and how the model's state divides the history."""

    events: list[KeptEvent]
    num_events: int
    seq: int
    chunk_size: int
    window_chunks: int


RequestTime = Annotated[
    int | UnsetType | None,
    Meta(description="Unix seconds; missing: the server's clock where the data set's clock is unix; null: none."),
]
MinSeq = Annotated[
    int,
    Meta(description="Wait, up to the deadline, until this sequence number is kept; `stale` tells if it was not."),
]


ToldUser = Annotated[
    dict[str, str | int | float | list[str | int] | None],
    Meta(description="Features of the user that the run reads, for this answer only; what is missing is unknown."),
]


class RecommendRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """What to recommend. `events` serve this answer only and are not kept."""

    k: Annotated[int, Meta(description="Items wanted.")] = 10
    request_time: RequestTime = UNSET
    exclude_seen: Annotated[bool | None, Meta(description="Leave out items the user had; missing: as the run.")] = None
    which: Annotated[ItemList, Meta(description="again: only items the user had; new: only others.")] = field(
        default="all", name="list"
    )
    events: list[EventMessage] = []
    allow: Annotated[list[str] | None, Meta(description="Only these items; null: any.")] = None
    deny: Annotated[list[str], Meta(description="None of these items.")] = []
    min_seq: MinSeq = 0
    user: ToldUser = {}


class ScoredItem(Struct, frozen=True):
    """One recommended item."""

    item_id: str
    score: float


class Provenance(Struct, frozen=True, kw_only=True):
    """Exactly which model, index and state an answer comes from."""

    num_events: Annotated[int, Meta(description="Events this answer knows, those of the request included.")]
    model_version: str
    index_version: str
    seq: Annotated[int, Meta(description="Last sequence number kept for this user.")]
    state_seq: Annotated[int, Meta(description="Last sequence number this answer knows.")]
    state_source: Annotated[
        StateSource | None,
        Meta(
            description="gpu, host: held in memory; store: from the cold store; rebuilt: from the event log; "
            "none: no events kept; degraded: what could be had in time; null: not for a token without `inspect`."
        ),
    ]
    state_parity: Annotated[
        Parity,
        Meta(description="exact: as if computed from the events; int8: made from summaries rounded to int8."),
    ]
    request_time: int | None
    beyond_trained_length: Annotated[bool, Meta(description="The history is longer than any the model trained on.")]
    degraded: Annotated[bool, Meta(description="Not all events are known to this answer; a later one will be whole.")]
    stale: Annotated[bool, Meta(description="The sequence number asked for was not reached in time.")]


class RecommendAnswer(Provenance, frozen=True, kw_only=True):
    """Recommended items, best first."""

    items: list[ScoredItem]


class RecommendBatchRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """One question about several users."""

    user_ids: list[str]
    k: int = 10
    request_time: RequestTime = UNSET
    exclude_seen: bool | None = None
    which: ItemList = field(default="all", name="list")
    allow: list[str] | None = None
    deny: list[str] = []
    users: Annotated[
        list[ToldUser], Meta(description="What is told of each user, in the order of user_ids; empty: nothing.")
    ] = []


class RecommendBatchAnswer(Struct, frozen=True):
    """One answer a user, in the order asked."""

    answers: list[RecommendAnswer]


class ScoreRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Which items to score."""

    item_ids: list[str]
    request_time: RequestTime = UNSET
    min_seq: MinSeq = 0
    user: ToldUser = {}


class ItemScore(Struct, frozen=True):
    """An item's score; null where the model does not know the item."""

    item_id: str
    score: float | None


class ScoreAnswer(Provenance, frozen=True, kw_only=True):
    """Scores, in the order asked; those `recommend` would give."""

    scores: list[ItemScore]


class ExplainRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Which item's score to explain. `chunks`: how many chunks to leave out in turn, and to list."""

    item_id: str
    chunks: int = 5
    request_time: RequestTime = UNSET
    min_seq: MinSeq = 0
    user: ToldUser = {}


class ChunkExplanation(Struct, frozen=True):
    """What one chunk gave."""

    chunk: int
    seen_as: Annotated[
        Literal["summary", "events", "counts"], Meta(description="By the network; counts: by the own counts alone.")
    ]
    attention: Annotated[float, Meta(description="Share of the last block's attention, mean over heads.")]
    attention_by_layer: Annotated[list[float], Meta(description="The same in each block, the last one's at the end.")]
    score_change: Annotated[
        float | None, Meta(description="What the score loses without this chunk: when the last event does not see it.")
    ]
    own_item_change: Annotated[float, Meta(description="The part of it that is the user's own counts of the item.")]
    first_time: int
    last_time: int
    events: list[KeptEvent]


class ExplainAnswer(Provenance, frozen=True, kw_only=True):
    """The chunks that carried a score, those without which it changes most first."""

    item_id: str
    score: float
    own_item_bias: Annotated[float, Meta(description="Part of the score that comes from having had the item before.")]
    summary_attention: Annotated[float, Meta(description="Share of the attention on summaries: on the far past.")]
    chunks: list[ChunkExplanation]


class StateAnswer(Struct, frozen=True):
    """What is kept of a user: `num_events` and `seq` from the event log, the rest from the state held."""

    num_events: int
    seq: int
    state_source: StateSource
    state_seq: int
    state_parity: Parity
    nbytes: Annotated[int, Meta(description="Keys and values, bytes.")]
    seen_nbytes: int
    fixed_nbytes: int
    model_version: str
    index_version: str
    state_fingerprint: str


class ForgottenAnswer(Struct, frozen=True):
    """A user was deleted. From each tier the bytes are overwritten or gone within `purged_within_seconds`."""

    num_events: int
    tiers: list[str]
    purged_within_seconds: int = 60


class TitlesRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Whose titles are wanted."""

    item_ids: list[str]


class ItemTitle(Struct, frozen=True):
    """What people call an item; null where it has no title."""

    item_id: str
    title: str | None


class ItemsAnswer(Struct, frozen=True):
    """Items with titles."""

    items: list[ItemTitle]


class HealthAnswer(Struct, frozen=True):
    """Whether this process lives, or is ready, and if not why."""

    status: Literal["ok", "unready"]
    reason: str | None = None


class LoadRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Which run under the releases' folder to load; a name, never a path."""

    run: str


class ReleaseInfo(Struct, frozen=True):
    """A release this process has loaded."""

    model_version: str
    index_version: str
    state_fingerprint: str
    run: str
    role: Literal["active", "previous", "loaded"]


class WarmingInfo(Struct, frozen=True):
    """A release that is being loaded: states of users made ready so far, and in all."""

    run: str
    warmed: int
    to_warm: int


class ReleasesAnswer(Struct, frozen=True):
    """All releases loaded, and the one whose states are being made ready."""

    releases: list[ReleaseInfo]
    draining: bool = False
    warming: WarmingInfo | None = None


class ExportRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """To which process users are to go, and after which place of the log to go on."""

    target: str
    after: Cursor = Cursor()


class TallyRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Which virtual shards to count."""

    virtual_shards: list[int]


class OwnershipAnswer(Struct, frozen=True):
    """What this process knows of the shard map (null: it owns everyone), and how many users it keeps."""

    ownership: Ownership | None
    num_users: int


class ReleasedAnswer(Struct, frozen=True):
    """How many users who are another process's were taken out just now; 0: none are left."""

    users: int


class Problem(Struct, frozen=True):
    """An error, as RFC 9457 says; `code` is stable, `detail` is for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
