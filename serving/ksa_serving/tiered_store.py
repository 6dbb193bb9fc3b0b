"""Memory before a cold store."""

import threading
from collections import Counter
from collections.abc import Callable

from ksa_serving.events import Owner
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.state_store import StateRecord, StateStore


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
        self.memory = MemoryStateStore(memory_bytes, largest_share)
        self.cold = cold
        self.hits: Counter[str] = Counter()
        self._worth_keeping = worth_keeping
        self._spill_events = spill_events
        self._written: dict[tuple[Owner, str], int] = {}
        self._leaving: Counter[Owner] = Counter()
        self._dropped: set[Owner] = set()
        self._lock = threading.Lock()

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
        """Hold a record in memory, write down what it drives out, and itself if it has grown much since."""
        with self._lock:
            evicted = self.memory.exchange(record)
            self._leaving.update(gone.owner for gone in evicted)
        for gone in evicted:
            self._spill(gone)
        written = self._written.get((record.owner, record.fingerprint), 0)
        if abs(record.num_events - written) >= self._spill_events:
            self._write(record)

    def drop(self, owner: Owner) -> None:
        """Forget the owner in both tiers."""
        for key in [key for key in self._written if key[0] == owner]:
            self._written.pop(key, None)
        with self._lock:
            self.memory.drop(owner)
            if self._leaving[owner]:  # on its way to the disk just now: whoever writes it drops it again
                self._dropped.add(owner)
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
        """Write down a record that has left memory, unless its owner is dropped meanwhile."""
        self.evictions += 1
        try:
            self._write(record)
        finally:
            self._written.pop((record.owner, record.fingerprint), None)
            with self._lock:
                dropped = record.owner in self._dropped
                self._leaving -= Counter([record.owner])
                if record.owner not in self._leaving:
                    self._dropped.discard(record.owner)
            if dropped:
                self.cold.drop(record.owner)

    def _write(self, record: StateRecord) -> None:
        if not record.cold and self._worth_keeping(record.num_events):
            self.cold.put(record)
            self._written[record.owner, record.fingerprint] = record.num_events
