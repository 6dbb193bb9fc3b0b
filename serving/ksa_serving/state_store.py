"""Where user states are held between calls: a record, and the contract of every store.

A state is a cache. Losing one costs time, never data: it is rebuilt from the event log.
"""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from ksa_serving.events import Order, Owner
from ksa_serving.messages import Parity
from ksa_serving.models import Mark, Vocabulary


@dataclass(frozen=True)
class StateRecord:
    """A user state with all that is needed to know whose and what it is. A value: never changed, only replaced."""

    owner: Owner
    generation: int
    fingerprint: str
    """State fingerprint of the model that computed it."""
    num_events: int
    seq: int
    """Highest sequence number in it; every event of this user up to it is in the state."""
    chain: bytes
    """The log's rolling hash at `seq`: proof that the state came from this log."""
    last_order: Order | None
    """Order of the last event; an event before it is late."""
    marks: tuple[Mark, ...]
    """Places from which the history hash can be computed anew, oldest first."""
    state: Any
    """Carries the rolling hash of its events."""
    nbytes: int
    vocabulary: Vocabulary
    """Of the model that computed it."""
    cold: bool = False
    """Whether it holds summaries only; the rest is replayed from the log before use."""
    parity: Parity = "exact"
    """How the state compares with one computed from its events; appending and replaying keep it."""


class Tier(NamedTuple):
    """How much one tier of a store holds, and how many records it has let go for want of room."""

    num_records: int
    nbytes: int
    evictions: int


class StateStore(ABC):
    """Holds the newest state of some users.

    What every store keeps to, and the tests of the contract check:

    - `get` returns the record last put for exactly this owner and fingerprint, or a cold one that knows no more, or
      None. A record that is another's, of another fingerprint or damaged is a miss, counted in `misses`, and never
      returned.
    - `put` may drop any records, also the one just put, to stay within the store's size.
    - A record never replaces one of a newer generation, nor one of the same generation that knows more.
    - `drop` makes `get` return None for this owner until the next `put`.
    - Records are values: what `get` returned stays valid whatever is put or dropped later.
    - Every method may be called from any thread. No method raises because a disk or server fails: that is a miss.
    """

    @property
    @abstractmethod
    def misses(self) -> Counter[str]:
        """Why `get` returned None: `absent`, `fingerprint`, `owner`, `parity`, `damaged`,
        `unavailable`.
        """

    @abstractmethod
    def get(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record if it is of this fingerprint."""

    def ready(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record if it can be had without reading from a disk or server."""
        return self.get(owner, fingerprint)

    @abstractmethod
    def put(self, record: StateRecord) -> bool:
        """Hold a record in place of the owner's older one of its fingerprint; return False where a disk or server
        failed, so that it is worth trying again.
        """

    @abstractmethod
    def drop(self, owner: Owner) -> None:
        """Forget the owner's records of every fingerprint."""

    @abstractmethod
    def retire(self, fingerprint: str) -> None:
        """Forget everyone's records of a fingerprint that is no longer served."""

    def tiers(self) -> dict[str, Tier]:
        """Return what is held where, by `memory` or `cold`; a disk or server may be asked."""
        return {"memory": Tier(len(self), self.nbytes, self.evictions)}

    def flush(self) -> None:  # noqa: B027 - most stores hold nothing back
        """Write what is held back to where it survives a restart."""

    def purge(self) -> bool:
        """Make what was dropped unreadable on disk too; return whether nothing of it is left."""
        return True

    @property
    def unwritable_seconds(self) -> float:
        """For how long nothing could be written to the disk or server behind; 0 while it can."""
        return 0.0

    def probe(self) -> None:  # noqa: B027
        """Try to write without keeping anything: so `unwritable_seconds` tells of recovery also when nothing comes."""

    @property
    def is_available(self) -> bool:
        """Whether the disk or server behind is asked; while it fails, everything there is a miss at once."""
        return True

    def close(self) -> None:  # noqa: B027
        """Flush and let go of files and connections."""

    @property
    @abstractmethod
    def evictions(self) -> int:
        """Records let go for want of room."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many records are held."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the records held."""


def is_newer(held: StateRecord, record: StateRecord) -> bool:
    """Return whether `held` knows more than `record`."""
    if held.generation != record.generation:
        return held.generation > record.generation
    return held.seq > record.seq
