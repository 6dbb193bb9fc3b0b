"""Memory before a cold store."""

import threading
from collections import Counter
from collections.abc import Callable

from ksa_serving.events import Owner
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.models import Vocabulary
from ksa_serving.state_store import StateRecord, StateStore, Tier

Written = tuple[int, Vocabulary, bool]
"""What the cold tier was last given of a state: how many events, as read by which vocabulary; whether it has them."""


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
        self._evictions = 0
        self.memory = MemoryStateStore(memory_bytes, largest_share)
        self.cold = cold
        self.hits: Counter[str] = Counter()
        self._worth_keeping = worth_keeping
        self._spill_events = spill_events
        self._written: dict[Owner, dict[str, Written]] = {}
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
            self._note(record)
        return record

    def ready(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's record from memory."""
        return self.memory.get(owner, fingerprint)

    def put(self, record: StateRecord) -> bool:
        """Hold a record in memory, write down what it drives out, and itself if it has grown much since."""
        with self._lock:
            evicted = self.memory.exchange(record)
            self._leaving.update(gone.owner for gone in evicted)
        for gone in evicted:
            self._spill(gone)
        num_events, vocabulary, _ = self._written_of(record) or (0, record.vocabulary, False)
        if abs(record.num_events - num_events) >= self._spill_events or vocabulary != record.vocabulary:
            self._write(record)
        return True

    def drop(self, owner: Owner) -> None:
        """Forget the owner in both tiers."""
        self._written.pop(owner, None)
        with self._lock:
            self.memory.drop(owner)
            if self._leaving[owner]:  # on its way to the disk just now: whoever writes it drops it again
                self._dropped.add(owner)
        self.cold.drop(owner)

    def retire(self, fingerprint: str) -> None:
        """Forget a fingerprint in both tiers."""
        for owner in list(self._written):
            self._unnote(owner, fingerprint)
        self.memory.retire(fingerprint)
        self.cold.retire(fingerprint)

    def tiers(self) -> dict[str, Tier]:
        """Return what both tiers hold."""
        return {**self.memory.tiers(), "cold": Tier(len(self.cold), self.cold.nbytes, self.cold.evictions)}

    def flush(self) -> None:
        """Write down every record held."""
        for record in self.memory.records():
            if self._written_of(record) != (record.num_events, record.vocabulary, True):
                self._write(record)
        self.cold.flush()

    def purge(self) -> bool:
        """Purge the cold tier."""
        return self.cold.purge()

    @property
    def unwritable_seconds(self) -> float:
        """For how long the cold tier could not be written."""
        return self.cold.unwritable_seconds

    def probe(self) -> None:
        """Try to write to the cold tier."""
        self.cold.probe()

    @property
    def is_available(self) -> bool:
        """Whether the cold tier is."""
        return self.cold.is_available

    def close(self) -> None:
        """Flush, then close the cold tier."""
        self.flush()
        self.cold.close()

    @property
    def evictions(self) -> int:
        """Records that left memory for want of room."""
        return self._evictions

    def __len__(self) -> int:
        """Return how many records are in memory."""
        return len(self.memory)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.memory.nbytes

    def _spill(self, record: StateRecord) -> None:
        """Write down a record that has left memory, unless its owner is dropped meanwhile."""
        self._evictions += 1
        try:
            self._write(record)
        finally:
            self._unnote(record.owner, record.fingerprint)
            with self._lock:
                dropped = record.owner in self._dropped
                self._leaving -= Counter([record.owner])
                if record.owner not in self._leaving:
                    self._dropped.discard(record.owner)
            if dropped:
                self.cold.drop(record.owner)

    def _write(self, record: StateRecord) -> None:
        if not record.cold and self._worth_keeping(record.num_events):
            self._note(record, self.cold.put(record))  # what failed is tried again as late as what did not, or by flush

    def _note(self, record: StateRecord, has: bool = True) -> None:
        """Remember what the cold tier was given, and whether it has it."""
        self._written.setdefault(record.owner, {})[record.fingerprint] = record.num_events, record.vocabulary, has

    def _unnote(self, owner: Owner, fingerprint: str) -> None:
        written = self._written.get(owner, {})
        written.pop(fingerprint, None)
        if not written:
            self._written.pop(owner, None)

    def _written_of(self, record: StateRecord) -> Written | None:
        return self._written.get(record.owner, {}).get(record.fingerprint)
