"""What is served: one recommender with the names by which its answers can be traced.

Loading one imports torch; this module does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from recsys_ksa.order import TieKind

Clock = Literal["unix", "relative", "ordinal"]


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


class SequenceRecommender(Protocol):
    """The part of `recsys_ksa.Recommender` that the service calls. States are values: no call changes one."""

    def new_state(self) -> Any:
        """Return the state of a user without events."""
        ...

    def append(
        self,
        state: Any,
        item_ids: Sequence[str],
        timestamps: Sequence[int],
        event_types: Sequence[str | None] | None = None,
        features: Mapping[str, Sequence[object]] | None = None,
        event_ids: Sequence[str | None] | None = None,
    ) -> Any:
        """Return `state` with events added."""
        ...

    def recommend(
        self,
        state: Any,
        k: int = 10,
        request_time: int | None = None,
        exclude_seen: bool | None = None,
        only_seen: bool = False,
    ) -> list[tuple[str, float]]:
        """Return at most k (item id, score), best first."""
        ...


@dataclass(frozen=True)
class Release:
    """A recommender and what identifies it."""

    recommender: SequenceRecommender
    tie: TieKind
    clock: Clock
    model_version: str
    """Hash of weights and everything else an answer depends on, but the index."""
    index_version: str
    state_fingerprint: str
    """Hash of what a state depends on; states of another are never used."""
    longest_trained_history: int | None
    """Events; longer histories are answered and flagged."""
    index_source: str = "memory"
    """Where retrieval comes from, for people."""


def load_release(run: Path) -> Release:
    """Load a run or bundle for serving.

    Raises:
        RunError: it is damaged, or its index belongs to other weights.
    """
    from recsys_ksa.recommender import Recommender  # imports torch

    recommender = Recommender.load(run)
    info = recommender.run.info
    return Release(
        recommender=recommender,
        tie=info.tie,
        clock=info.clock,
        model_version=info.release_hash,
        index_version=recommender.index.version,
        state_fingerprint=recommender.fingerprint,
        longest_trained_history=info.longest_trained_history,
        index_source=recommender.index.kind,
    )
