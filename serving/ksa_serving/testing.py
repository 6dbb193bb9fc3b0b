"""A model without a network, for tests of everything around it: fast, exact, and easy to compare.

Its state is a pure function of the ordered events, so two states are equal if and only if they know the same
history in the same order; its answers are a pure function of state and question. As the real one it has rows that a
cold state keeps (`hashes`, in segments) and rows that it lacks (`window`), and it refuses what the real one refuses.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import msgspec

from ksa_serving.errors import InvalidRequestError
from ksa_serving.events import Meeting, StoredEvent
from ksa_serving.messages import Parity, StateTier
from ksa_serving.models import ChunkReason, Mark, Question, Scored, StateParts, Vocabulary
from ksa_serving.release import Clock, Release
from recsys_ksa.errors import OutOfOrderError, StateError
from recsys_ksa.order import OrderKey, TieKind, order_key

CATALOGUE = tuple(f"item-{number}" for number in range(200))
SEGMENT = 8


@dataclass(frozen=True)
class ToyState:
    """What the toy keeps of a history: a hash after each event, and the window's events (None: cold)."""

    hashes: tuple[bytes, ...] = ()
    window: tuple[str, ...] | None = ()
    last_key: OrderKey | None = None
    seen: frozenset[str] = frozenset()
    fingerprint: str = "toy-state"

    @property
    def num_events(self) -> int:
        """Events of the history."""
        return len(self.hashes)

    @property
    def history_hash(self) -> bytes:
        """Rolling hash of all events."""
        return self.hashes[-1] if self.hashes else bytes(32)

    @property
    def nbytes(self) -> int:
        """As if each event took 8 bytes."""
        return 8 * self.num_events

    @property
    def seen_nbytes(self) -> int:
        """24 bytes a distinct item, as in the real state."""
        return 24 * len(self.seen)

    @property
    def fixed_nbytes(self) -> int:
        """The hash."""
        return 32


class ToyModel:
    """Scores are drawn by a hash of history and request time."""

    chunk_size = 4
    window_chunks = 2

    def __init__(
        self,
        tie: TieKind = "arrival",
        fingerprint: str = "toy-state",
        cold_parity: Parity = "exact",
        num_items: int = len(CATALOGUE),
        tier: StateTier = "host",
    ):
        self.cold_parity: Parity = cold_parity
        self.num_newest = 1
        self.tier: StateTier = tier
        self.vocabulary = Vocabulary(num_items)
        self._tie: TieKind = tie
        self._fingerprint = fingerprint

    def new_state(self) -> ToyState:
        """Return the state of a user without events."""
        return ToyState(fingerprint=self._fingerprint)

    def append(self, state: ToyState, events: Sequence[StoredEvent]) -> ToyState:
        """Return the state after further events, given in order.

        Raises:
            OutOfOrderError: they are not, or the first lies before the state's last.
            StateError: the state is cold, or another model's.
        """
        if state.window is None or state.fingerprint != self._fingerprint:
            raise StateError("toy: expected a whole state of this model, got a cold one or another's.")
        if not events:
            return state
        keys = [self._key(event, state.num_events + place) for place, event in enumerate(events)]
        if any(b < a for a, b in pairwise([state.last_key or keys[0], *keys])):
            raise OutOfOrderError("toy: expected later events in order, got an earlier one. Sort them.")
        hashes, window = list(state.hashes), list(state.window)
        for event in events:
            hashes.append(self._hash(hashes[-1] if hashes else bytes(32), event))
            window.append(_payload(event))
        return replace(
            state,
            hashes=tuple(hashes),
            window=tuple(window[len(window) - (len(hashes) - self.replay_start(len(hashes))) :]),
            last_key=keys[-1],
            seen=state.seen | {event.item_id for event in events},
        )

    def append_batch(self, states: Sequence[ToyState], events: Sequence[Sequence[StoredEvent]]) -> list[ToyState]:
        """Return each state after its own events."""
        return [self.append(state, given) for state, given in zip(states, events)]

    def replay_start(self, num_events: int) -> int:
        """Return the first event of the window."""
        return max(0, max(0, num_events - 1) // self.chunk_size - self.window_chunks) * self.chunk_size

    def rewind(
        self, state: ToyState, num_events: int, first: int, events: Sequence[StoredEvent], mark: Mark
    ) -> ToyState:
        """Return the state of the first `num_events` events; checks that it was given the right ones."""
        if num_events == 0:
            return self.new_state()
        start = self.replay_start(num_events)
        assert len(events) == num_events - first
        assert first <= max(0, min(mark.num_events, start - 1))
        rolled = mark.history_hash
        for event in events[mark.num_events - first :]:
            rolled = self._hash(rolled, event)
        assert rolled == state.hashes[num_events - 1]
        window = tuple(_payload(event) for event in events[start - first :])
        key = self._key(events[-1], num_events - 1)
        return replace(state, hashes=state.hashes[:num_events], window=window, last_key=key, seen=frozenset())

    def with_own_items(self, state: ToyState, before: ToyState | None, added: Sequence[StoredEvent]) -> ToyState:
        """Return `state` with the items of `before` and `added`."""
        had = frozenset[str]() if before is None else before.seen
        return replace(state, seen=had | {event.item_id for event in added})

    def segment_names(self, state: ToyState) -> list[bytes]:
        """Return the names of `dump`'s segments."""
        return list(self.dump(state).segments)

    def reads_anew(self, state: ToyState, vocabulary: Vocabulary, item_ids: Iterable[str]) -> bool:
        """Return whether the state has an item that only one of the two vocabularies knows; they share `CATALOGUE`."""
        low, high = sorted((vocabulary.num_items, self.vocabulary.num_items))
        return not state.seen.isdisjoint(CATALOGUE[low:high])

    def dump(self, state: ToyState) -> StateParts:
        """Return a state as bytes, without its window."""
        whole = state.num_events // SEGMENT * SEGMENT
        parts = [b"".join(state.hashes[at : at + SEGMENT]) for at in range(0, whole, SEGMENT)]
        segments = {hashlib.sha256(part).digest()[:16]: part for part in parts}
        about = (list(segments), state.hashes[whole:], state.last_key, sorted(state.seen), state.fingerprint)
        return StateParts(msgspec.msgpack.encode(about), segments)

    def load(self, parts: StateParts) -> ToyState:
        """Return the cold state of `dump`'s bytes."""
        kind = tuple[list[bytes], list[bytes], tuple[int, bytes] | None, list[str], str]
        names, tail, last_key, seen, fingerprint = msgspec.msgpack.decode(parts.about, type=kind)
        if fingerprint != self._fingerprint:
            raise StateError("toy: expected a state of this model, got another's.")
        whole = b"".join(parts.segments[name] for name in names)
        hashes = [whole[at : at + 32] for at in range(0, len(whole), 32)] + tail
        return ToyState(tuple(hashes), None, last_key, frozenset(seen), fingerprint)

    def difference(self, state: ToyState, other: ToyState) -> float:
        """Return 0 or infinity."""
        return 0.0 if state == other else float("inf")

    def recommend(self, questions: Sequence[Question]) -> list[Scored]:
        """Answer each question by itself."""
        return [self._recommend(asked) for asked in questions]

    def score(
        self, state: ToyState, item_ids: Sequence[str], request_time: int | None, user: object = None
    ) -> list[float | None]:
        """Return numbers in [0, 1), None for items it does not know."""
        scores = self._scores(state, request_time)
        return [scores.get(item) for item in item_ids]

    def own_item_bias(self, state: ToyState, item_id: str, request_time: int | None) -> float | None:
        """Return 0: scores here know no counts."""
        return 0.0 if item_id in state.seen else None

    def explain(
        self,
        state: ToyState,
        newest: Sequence[StoredEvent],
        met: Sequence[Meeting],
        item_id: str,
        request_time: int | None,
        most: int,
        user: object = None,
    ) -> list[ChunkReason]:
        """Return equal shares for all chunks; an own item's part in the change is how often the chunk has it."""
        if state.window and [_payload(event) for event in newest] != list(state.window[-1:]):
            raise StateError("toy: expected the state's last event, got another.")
        if bool(met) != (item_id in state.seen):
            raise StateError(f"toy: expected the events of {item_id!r}, got {len(met)}.")
        if item_id not in CATALOGUE:
            raise InvalidRequestError("item_id: expected an item the model knows, got another.", "unknown-item")
        starts = range(0, state.num_events, self.chunk_size)
        window = self.replay_start(state.num_events)
        return [
            ChunkReason(
                first=start,
                last=min(start + self.chunk_size, state.num_events) - 1,
                seen_as="events" if start >= window else "summary",
                attention=1 / len(starts),
                attention_by_layer=[1 / len(starts)],
                score_change=0.0 if place < most else None,
                own_item_change=float(sum(meeting.place // self.chunk_size == place for meeting in met)),
            )
            for place, start in enumerate(starts)
        ]

    def title(self, item_id: str) -> str | None:
        """Return a name for every known item."""
        return f"Item {item_id.removeprefix('item-')}" if item_id in CATALOGUE else None

    def find_items(self, text: str, most: int) -> list[str]:
        """Return items whose id has `text` in it."""
        return [item for item in CATALOGUE if text.casefold() in item][:most]

    def _recommend(self, asked: Question) -> Scored:
        if asked.state.window is None:
            raise StateError("toy: expected a whole state, got a cold one.")
        seen = asked.state.seen
        items = [item for item in CATALOGUE if not (asked.only_seen and item not in seen)]
        items = [item for item in items if not (asked.exclude_seen and item in seen)]
        items = [item for item in items if asked.allow is None or item in asked.allow]
        scores = self._scores(asked.state, asked.request_time)
        scored = [(item, scores[item]) for item in items if item not in asked.deny]
        return sorted(scored, key=lambda pair: -pair[1])[: asked.k]

    def _scores(self, state: ToyState, request_time: int | None) -> dict[str, float]:
        last = state.last_key[0] if state.last_key else 0
        asked = b"" if request_time is None else str(max(0, request_time - last)).encode()
        drawn = hashlib.shake_128(state.history_hash + asked).digest(6 * len(CATALOGUE))
        return {
            item: int.from_bytes(drawn[6 * place : 6 * place + 6], "big") / 2**48
            for place, item in enumerate(CATALOGUE)
        }

    def _hash(self, before: bytes, event: StoredEvent) -> bytes:
        return hashlib.sha256(before + _payload(event).encode()).digest()

    def _key(self, event: StoredEvent, place: int) -> OrderKey:
        event_id, event_type = event.event_id, event.event_type
        return order_key(
            self._tie, event.timestamp, event.item_id, event_id=event_id, event_type=event_type, arrival=place
        )


def _payload(event: StoredEvent) -> str:
    return f"{event.timestamp}/{event.item_id}/{event.event_type}"


def toy_release(tie: TieKind = "arrival", clock: Clock = "unix", fingerprint: str = "toy-state") -> Release:
    """Return a release of the toy."""
    return Release(ToyModel(tie, fingerprint), tie, clock, "toy-model", "toy-index", fingerprint, 1000, "toy")
