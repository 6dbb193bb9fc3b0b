"""A recommender without a model, for tests of everything around it: fast, exact, and easy to compare.

Its state is a pure function of the ordered events, so two states are equal if and only if they know the same
history in the same order; its answers are a pure function of state and question. It refuses what the real one refuses.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ksa_serving.release import Clock, Release
from recsys_ksa.errors import OutOfOrderError
from recsys_ksa.order import OrderKey, TieKind, order_key

CATALOGUE = tuple(f"item-{number}" for number in range(200))


@dataclass(frozen=True)
class ToyState:
    """What the toy keeps of a history."""

    num_events: int = 0
    last_key: OrderKey | None = None
    history_hash: bytes = bytes(32)
    seen: frozenset[str] = frozenset()

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


class ToyRecommender:
    """Scores are hashes of history, item and request time."""

    def __init__(self, tie: TieKind = "arrival"):
        self._tie: TieKind = tie

    def new_state(self) -> ToyState:
        """Return the state of a user without events."""
        return ToyState()

    def append(
        self,
        state: ToyState,
        item_ids: Sequence[str],
        timestamps: Sequence[int],
        event_types: Sequence[str | None] | None = None,
        features: Mapping[str, Sequence[object]] | None = None,
        event_ids: Sequence[str | None] | None = None,
    ) -> ToyState:
        """Return the state after further events, sorted by the order.

        Raises:
            OutOfOrderError: the first, after sorting, lies before the state's last.
        """
        num = len(item_ids)
        events = zip(item_ids, timestamps, event_types or [None] * num, event_ids or [None] * num)
        keyed = [
            (
                order_key(self._tie, time, item, event_id=id_, event_type=kind, arrival=state.num_events + place),
                item,
                kind,
            )
            for place, (item, time, kind, id_) in enumerate(events)
        ]
        for key, item, kind in sorted(keyed, key=lambda event: event[0]):
            if state.last_key is not None and key < state.last_key:
                raise OutOfOrderError("toy: expected later events, got an earlier one. Sort them.")
            payload = f"{key[0]}/{item}/{kind}".encode()
            state = replace(
                state,
                num_events=state.num_events + 1,
                last_key=key,
                history_hash=hashlib.sha256(state.history_hash + payload).digest(),
                seen=state.seen | {item},
            )
        return state

    def recommend(
        self,
        state: ToyState,
        k: int = 10,
        request_time: int | None = None,
        exclude_seen: bool | None = None,
        only_seen: bool = False,
    ) -> list[tuple[str, float]]:
        """Return at most k items, best first."""
        items = [item for item in CATALOGUE if not (only_seen and item not in state.seen)]
        items = [item for item in items if not (exclude_seen and item in state.seen)]
        last = state.last_key[0] if state.last_key else 0
        asked = b"" if request_time is None else str(max(0, request_time - last)).encode()
        scores = {item: hashlib.sha256(state.history_hash + item.encode() + asked).digest() for item in items}
        best = sorted(items, key=lambda item: scores[item], reverse=True)[:k]
        return [(item, int.from_bytes(scores[item][:6], "big") / 2**48) for item in best]


def toy_release(tie: TieKind = "arrival", clock: Clock = "unix", fingerprint: str = "toy-state") -> Release:
    """Return a release of the toy."""
    return Release(ToyRecommender(tie), tie, clock, "toy-model", "toy-index", fingerprint, 1000, "toy")
