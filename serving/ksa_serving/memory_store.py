"""States in this process's memory."""

import threading
from collections import Counter, OrderedDict
from typing import Any

from ksa_serving.events import Owner
from ksa_serving.state_store import StateRecord, StateStore, is_newer


class MemoryStateStore(StateStore):
    """States in this process's memory; beyond `max_bytes` the least recently used go first.

    Args:
        max_bytes: of all records.
        largest_share: records larger than this share of `max_bytes` go before all others, also one that was just put:
            they are held where others leave room, and one user never drives out many.
    """

    def __init__(self, max_bytes: int, largest_share: float = 1.0):
        self._misses: Counter[str] = Counter()
        self._evictions = 0
        self._max_bytes = max_bytes
        self._largest = int(largest_share * max_bytes)
        self._nbytes = 0
        self._records: OrderedDict[tuple[Owner, str], StateRecord] = OrderedDict()
        self._large: OrderedDict[tuple[Owner, str], None] = OrderedDict()
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
            if (owner, fingerprint) in self._large:
                self._large.move_to_end((owner, fingerprint))
            return record

    @property
    def misses(self) -> Counter[str]:
        """Why `get` returned None."""
        return self._misses

    def put(self, record: StateRecord) -> bool:
        """Hold a record in place of the owner's older one, then evict until the size holds."""
        self.exchange(record)
        return True

    def exchange(self, record: StateRecord) -> list[StateRecord]:
        """Do what `put` does; return the records that were let go for want of room."""
        evicted: list[StateRecord] = []
        with self._lock:
            held = self._records.get((record.owner, record.fingerprint))
            if held is not None and is_newer(held, record):
                return []
            key = record.owner, record.fingerprint
            self._remove(key)
            self._records[key] = record
            if record.nbytes > self._largest:
                self._large[key] = None
            self._fingerprints[record.fingerprint] += 1
            self._nbytes += record.nbytes
            while self._nbytes > self._max_bytes:
                evicted.append(self._remove(next(iter(self._large or self._records))))
            self._evictions += len(evicted)
        return evicted

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

    @property
    def evictions(self) -> int:
        """Records that left memory for want of room."""
        return self._evictions

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
            self._large.pop(key, None)
            self._nbytes -= record.nbytes
            self._fingerprints[key[1]] -= 1
            if not self._fingerprints[key[1]]:
                del self._fingerprints[key[1]]
        return record
