"""Where user states are held between calls: the contract of a store, the store in memory, and memory before disk.

A state is a cache. Losing one costs time, never data: it is rebuilt from the event log.
"""

import threading
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ksa_serving.events import Order, Owner
from ksa_serving.models import Mark


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
    cold: bool = False
    """Whether it holds summaries only; the rest is replayed from the log before use."""


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

    evictions: int

    @property
    @abstractmethod
    def misses(self) -> Counter[str]:
        """Why `get` returned None: `absent`, `fingerprint`, `owner`, `damaged`, `unavailable`."""

    @abstractmethod
    def get(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record if it is of this fingerprint."""

    def ready(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record if it can be had without reading from a disk or server."""
        return self.get(owner, fingerprint)

    @abstractmethod
    def put(self, record: StateRecord) -> None:
        """Hold a record in place of the owner's older one of its fingerprint."""

    @abstractmethod
    def drop(self, owner: Owner) -> None:
        """Forget the owner's records of every fingerprint."""

    @abstractmethod
    def retire(self, fingerprint: str) -> None:
        """Forget everyone's records of a fingerprint that is no longer served."""

    def flush(self) -> None:  # noqa: B027 - most stores hold nothing back
        """Write what is held back to where it survives a restart."""

    def purge(self) -> bool:
        """Make what was dropped unreadable on disk too; return whether nothing of it is left."""
        return True

    def close(self) -> None:  # noqa: B027
        """Flush and let go of files and connections."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many records are held."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the records held."""


class MemoryStateStore(StateStore):
    """States in this process's memory; beyond `max_bytes` the least recently used go first.

    Args:
        max_bytes: of all records.
        largest_share: a record larger than this share of `max_bytes` is not held: one user must not drive out many.
        on_evict: given each record that is let go for want of room.
    """

    def __init__(
        self,
        max_bytes: int,
        largest_share: float = 1.0,
        on_evict: Callable[[StateRecord], None] = lambda record: None,
    ):
        self._misses: Counter[str] = Counter()
        self.evictions = 0
        self._max_bytes = max_bytes
        self._largest = int(largest_share * max_bytes)
        self._on_evict = on_evict
        self._nbytes = 0
        self._records: OrderedDict[tuple[Owner, str], StateRecord] = OrderedDict()
        self._fingerprints: Counter[str] = Counter()
        self._lock = threading.Lock()

    def get(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record if it is of this fingerprint."""
        with self._lock:
            record = self._records.get((owner, fingerprint))
            if record is None:
                others = (other != fingerprint and (owner, other) in self._records for other in self._fingerprints)
                self._misses["fingerprint" if any(others) else "absent"] += 1
                return None
            if record.owner != owner or record.fingerprint != fingerprint:
                self._misses["owner" if record.owner != owner else "fingerprint"] += 1
                return None
            self._records.move_to_end((owner, fingerprint))
            return record

    @property
    def misses(self) -> Counter[str]:
        """Why `get` returned None."""
        return self._misses

    def put(self, record: StateRecord) -> None:
        """Hold a record in place of the owner's older one, then evict until the size holds."""
        evicted: list[StateRecord] = []
        with self._lock:
            held = self._records.get((record.owner, record.fingerprint))
            if held is not None and is_newer(held, record):
                return
            self._remove((record.owner, record.fingerprint))
            if record.nbytes > self._largest:
                evicted.append(record)
            else:
                self._records[record.owner, record.fingerprint] = record
                self._fingerprints[record.fingerprint] += 1
                self._nbytes += record.nbytes
                while self._nbytes > self._max_bytes:
                    evicted.append(self._remove(next(iter(self._records))))
            self.evictions += len(evicted)
        for gone in evicted:
            self._on_evict(gone)

    def drop(self, owner: Owner) -> None:
        """Forget the owner's records."""
        with self._lock:
            for fingerprint in list(self._fingerprints):
                self._remove((owner, fingerprint))

    def retire(self, fingerprint: str) -> None:
        """Forget everyone's records of a fingerprint."""
        with self._lock:
            for key in [key for key in self._records if key[1] == fingerprint]:
                self._remove(key)

    def records(self) -> list[StateRecord]:
        """Return all records held, the least recently used first."""
        with self._lock:
            return list(self._records.values())

    def __len__(self) -> int:
        """Return how many records are held."""
        return len(self._records)

    @property
    def nbytes(self) -> int:
        """Bytes of the records held."""
        return self._nbytes

    def _remove(self, key: tuple[Owner, str]) -> Any:
        record = self._records.pop(key, None)
        if record is not None:
            self._nbytes -= record.nbytes
            self._fingerprints[key[1]] -= 1
            if not self._fingerprints[key[1]]:
                del self._fingerprints[key[1]]
        return record


class TieredStateStore(StateStore):
    """Memory before a cold store. Long histories are written down now and then, and when they leave memory.

    A record is worth writing down once a cold one spares work: when a replay from its summaries starts later than at
    the first event (`worth_keeping`). Memory is always newer or equal; a crash loses at most what the log gives back.

    Args:
        memory_bytes, largest_share: of the tier in memory.
        cold: the tier behind it.
        spill_events: a held record is written down again after so many further events.
        worth_keeping: whether a history of so many events is worth a cold record.
    """

    def __init__(
        self,
        memory_bytes: int,
        cold: StateStore,
        worth_keeping: Callable[[int], bool],
        spill_events: int = 256,
        largest_share: float = 1.0,
    ):
        self.evictions = 0
        self.memory = MemoryStateStore(memory_bytes, largest_share, self._spill)
        self.cold = cold
        self.hits: Counter[str] = Counter()
        self._worth_keeping = worth_keeping
        self._spill_events = spill_events
        self._written: dict[tuple[Owner, str], int] = {}

    @property
    def misses(self) -> Counter[str]:
        """Misses of both tiers; `absent` only where both were."""
        return self.cold.misses + Counter({why: n for why, n in self.memory.misses.items() if why != "absent"})

    def get(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record from memory, or a cold one."""
        record = self.memory.get(owner, fingerprint)
        if record is not None:
            self.hits["memory"] += 1
            return record
        record = self.cold.get(owner, fingerprint)
        if record is not None:
            self.hits["cold"] += 1
            self._written[owner, fingerprint] = record.num_events
        return record

    def ready(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record from memory."""
        return self.memory.get(owner, fingerprint)

    def put(self, record: StateRecord) -> None:
        """Hold a record in memory, and write it down if it has grown much since."""
        self.memory.put(record)
        written = self._written.get((record.owner, record.fingerprint), 0)
        if abs(record.num_events - written) >= self._spill_events:
            self._write(record)

    def drop(self, owner: Owner) -> None:
        """Forget the owner in both tiers."""
        for key in [key for key in self._written if key[0] == owner]:
            self._written.pop(key, None)
        self.memory.drop(owner)
        self.cold.drop(owner)

    def retire(self, fingerprint: str) -> None:
        """Forget a fingerprint in both tiers."""
        for key in [key for key in self._written if key[1] == fingerprint]:
            self._written.pop(key, None)
        self.memory.retire(fingerprint)
        self.cold.retire(fingerprint)

    def flush(self) -> None:
        """Write down every record held."""
        for record in self.memory.records():
            if self._written.get((record.owner, record.fingerprint)) != record.num_events:
                self._write(record)
        self.cold.flush()

    def purge(self) -> bool:
        """Purge the cold tier."""
        return self.cold.purge()

    def close(self) -> None:
        """Flush, then close the cold tier."""
        self.flush()
        self.cold.close()

    def __len__(self) -> int:
        """Return how many records are in memory."""
        return len(self.memory)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.memory.nbytes

    def _spill(self, record: StateRecord) -> None:
        self.evictions += 1
        self._write(record)
        self._written.pop((record.owner, record.fingerprint), None)

    def _write(self, record: StateRecord) -> None:
        if not record.cold and self._worth_keeping(record.num_events):
            self.cold.put(record)
            self._written[record.owner, record.fingerprint] = record.num_events


def is_newer(held: StateRecord, record: StateRecord) -> bool:
    """Return whether `held` knows more than `record`."""
    if held.generation != record.generation:
        return held.generation > record.generation
    return held.seq > record.seq
