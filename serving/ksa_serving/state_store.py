"""Where user states are held between calls: the contract of a store, and the store in memory.

A state is a cache. Losing one costs time, never data: it is rebuilt from the event log.
"""

import threading
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from dataclasses import dataclass

from ksa_serving.events import Order, Owner
from ksa_serving.release import SizedState


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
    last_order: Order | None
    """Order of the last event; an event before it is late."""
    state: SizedState
    """Carries the rolling hash of its events."""
    nbytes: int


class StateStore(ABC):
    """Holds the newest state of some users.

    What every store keeps to, and the tests of the contract check:

    - `get` returns the record last put for exactly this owner and fingerprint, or None. A record that is
      another's, of another fingerprint or damaged is a miss, counted in `misses`, and never returned.
    - `put` may drop any records, also the one just put, to stay within the store's size.
    - A record never replaces one of a newer generation, nor one of the same generation and fingerprint that knows more.
    - `drop` makes `get` return None for this owner until the next `put`.
    - Records are values: what `get` returned stays valid whatever is put or dropped later.
    - Every method may be called from any thread.
    """

    misses: Counter[str]
    """Why `get` returned None: `absent`, `fingerprint`, `owner`, `damaged`."""

    @abstractmethod
    def get(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record if it is of this fingerprint."""

    @abstractmethod
    def put(self, record: StateRecord) -> None:
        """Hold a record in place of the owner's older one."""

    @abstractmethod
    def drop(self, owner: Owner) -> None:
        """Forget the owner's record, if there is one."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many records are held."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the records held."""


class MemoryStateStore(StateStore):
    """States in this process's memory; beyond `max_bytes` the least recently used go first."""

    def __init__(self, max_bytes: int):
        self.misses = Counter()
        self.evictions = 0
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._records: OrderedDict[Owner, StateRecord] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record if it is of this fingerprint."""
        with self._lock:
            record = self._records.get(owner)
            if record is None:
                self.misses["absent"] += 1
                return None
            if record.owner != owner or record.fingerprint != fingerprint:
                self.misses["owner" if record.owner != owner else "fingerprint"] += 1
                return None
            self._records.move_to_end(owner)
            return record

    def put(self, record: StateRecord) -> None:
        """Hold a record in place of the owner's older one, then evict until the size holds."""
        with self._lock:
            held = self._records.get(record.owner)
            if held is not None and _is_newer(held, record):
                return
            self._remove(record.owner)
            if record.nbytes > self._max_bytes:  # else it would drive out everyone and then itself
                self.evictions += 1
                return
            self._records[record.owner] = record
            self._nbytes += record.nbytes
            while self._nbytes > self._max_bytes:
                self._remove(next(iter(self._records)))
                self.evictions += 1

    def drop(self, owner: Owner) -> None:
        """Forget the owner's record, if there is one."""
        with self._lock:
            self._remove(owner)

    def __len__(self) -> int:
        """Return how many records are held."""
        return len(self._records)

    @property
    def nbytes(self) -> int:
        """Bytes of the records held."""
        return self._nbytes

    def _remove(self, owner: Owner) -> None:
        record = self._records.pop(owner, None)
        if record is not None:
            self._nbytes -= record.nbytes


def _is_newer(held: StateRecord, record: StateRecord) -> bool:
    if held.generation != record.generation:
        return held.generation > record.generation
    return held.fingerprint == record.fingerprint and held.seq > record.seq
