"""What the service asks of a model. States are values: no call changes one. Every method may be called at once.

`library_model.py` answers with `recsys_ksa.Recommender`, `testing.py` without a model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from msgspec import Struct

from ksa_serving.events import Meeting, StoredEvent
from ksa_serving.messages import Parity, StateTier

Scored = list[tuple[str, float]]
"""(item id, score), best first."""


class SizedState(Protocol):
    """What the service needs to know of a user state. Sizes in bytes."""

    @property
    def num_events(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def seen_nbytes(self) -> int: ...
    @property
    def fixed_nbytes(self) -> int: ...
    @property
    def history_hash(self) -> bytes: ...


@dataclass(frozen=True)
class Mark:
    """The rolling history hash after so many events: from here on it can be computed anew."""

    num_events: int
    history_hash: bytes


START = Mark(0, bytes(32))


@dataclass(frozen=True)
class StateParts:
    """A state as bytes.

    about: everything small, and what still changes.
    segments: rows that never change again, named by their content: 16 bytes of SHA-256 -> the bytes. Layout and dtype
        are told by `about`.
    """

    about: bytes
    segments: Mapping[bytes, bytes]


@dataclass(frozen=True)
class Question:
    """What `recommend` is asked about one state."""

    state: Any
    k: int
    request_time: int | None = None
    exclude_seen: bool | None = None
    only_seen: bool = False
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    user: Mapping[str, object] = field(default_factory=dict)


class ChunkReason(Struct, frozen=True, gc=False):
    """How much one chunk of the history carried a score.

    first, last: indices of its events, last included.
    seen_as: `summary`, `events`, or `counts`: no block sees it, the user's own counts have it.
    attention: share of the last event's attention, mean over heads, in the last block.
    attention_by_layer: the same in each block, the last one's at the end.
    score_change: what the item's score loses where the last event sees nothing of this chunk and the user's own counts
        lack it; None where that was not computed.
    own_item_change: the part of it that is the own counts'; 0 where the chunk does not have the item.
    """

    first: int
    last: int
    seen_as: Literal["summary", "events", "counts"]
    attention: float
    attention_by_layer: list[float]
    score_change: float | None
    own_item_change: float


@dataclass(frozen=True)
class Vocabulary:
    """Which items a model knows, among models of one state fingerprint: they share the first, some have more.

    num_items: rows, the unknown item's included.
    appended: hash of what states read of the rows beyond those that the fingerprint covers; "" where there are none.
    """

    num_items: int
    appended: str = ""


class Model(Protocol):
    """A recommender over user states."""

    chunk_size: int
    window_chunks: int
    cold_parity: Parity
    """Of a state made from `dump`'s bytes."""
    num_newest: int
    """Newest events that `explain` wants, where the history has so many."""
    tier: StateTier
    """Where the rows of a state that is held are."""
    vocabulary: Vocabulary

    def new_state(self) -> Any:
        """Return the state of a user without events."""
        ...

    def append(self, state: Any, events: Sequence[StoredEvent]) -> Any:
        """Return `state` with events, in order, appended."""
        ...

    def append_batch(self, states: Sequence[Any], events: Sequence[Sequence[StoredEvent]]) -> list[Any]:
        """Return each of several states with its own events, at least one, appended in one pass."""
        ...

    def replay_start(self, num_events: int) -> int:
        """Return the first event that `rewind` needs to rebuild what a cold state of so many events lacks."""
        ...

    def rewind(self, state: Any, num_events: int, first: int, events: Sequence[StoredEvent], mark: Mark) -> Any:
        """Return the state of the first `num_events` events of `state`, which may be cold; its own items are unset.

        Args:
            first: index of the first of `events`; at most `mark.num_events` and `max(0, replay_start(num_events) - 1)`.
            events: from there up to `num_events`.
            mark: a place in the history from which to compute the hash anew.

        Raises:
            StateError: the state no longer holds what it takes.
        """
        ...

    def with_own_items(self, state: Any, before: Any | None, added: Sequence[StoredEvent]) -> Any:
        """Return `state` with the own items of `before` and `added`; None: of `added` alone."""
        ...

    def reads_anew(self, state: Any, vocabulary: Vocabulary, item_ids: Iterable[str]) -> bool:
        """Return whether this model reads an event differently from the one that computed `state`.

        Args:
            vocabulary: that one's.
            item_ids: of all events of the state; only asked where the state has met unknown items.
        """
        ...

    def dump(self, state: Any) -> StateParts:
        """Return a state as bytes, without what `rewind` can rebuild: cold."""
        ...

    def load(self, parts: StateParts) -> Any:
        """Return the cold state of `dump`'s bytes.

        Raises:
            StateError: they are damaged or of another network.
        """
        ...

    def segment_names(self, state: Any) -> list[bytes]:
        """Return the names of `dump`'s segments."""
        ...

    def difference(self, state: Any, other: Any) -> float:
        """Return the largest difference of a row, relative to its norm; infinite where the histories differ."""
        ...

    def recommend(self, questions: Sequence[Question]) -> list[Scored]:
        """Answer questions in one batch; equals asking one by one."""
        ...

    def score(
        self, state: Any, item_ids: Sequence[str], request_time: int | None, user: Mapping[str, object] | None = None
    ) -> list[float | None]:
        """Return each item's score as `recommend` has it; None where the model does not know the item."""
        ...

    def own_item_bias(self, state: Any, item_id: str, request_time: int | None) -> float | None:
        """Return what the item's score gains by the user having met it; None where that never was."""
        ...

    def explain(
        self,
        state: Any,
        newest: Sequence[StoredEvent],
        met: Sequence[Meeting],
        item_id: str,
        request_time: int | None,
        most: int,
        user: Mapping[str, object] | None = None,
    ) -> list[ChunkReason]:
        """Return the chunks that the last event sees, those that changed the item's score most first.

        Args:
            newest: the state's last `num_newest` events, in order.
            met: all the state's events of the item, in order.
            most: chunks left out in turn at least; those that are not come last.

        Raises:
            InvalidRequestError: the model does not know the item, or does not read what is told of the user.
        """
        ...

    def title(self, item_id: str) -> str | None:
        """Return what people call an item."""
        ...

    def find_items(self, text: str, most: int) -> list[str]:
        """Return ids of items whose id or title has `text` in it."""
        ...
