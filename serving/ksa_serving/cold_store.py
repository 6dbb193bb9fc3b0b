"""Cold states as bytes in a key-value engine: everything is verified when it is read back.

A record is one *head* and its *segments*. The head says whose state it is, of which model, up to which entry of which
log; it names every segment by its content, and ends with its own checksum. So a record that was cut, mixed with
another's, left over from another log or model, or flipped by a bit is a miss, counted by its cause, never used.
Writing again writes only the segments that are new.
"""

import hashlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

import msgspec

from ksa_serving.events import Owner
from ksa_serving.messages import Parity
from ksa_serving.models import Mark, Model, StateParts, Vocabulary
from ksa_serving.state_store import StateRecord, StateStore
from recsys_ksa.errors import StateError

logger = logging.getLogger(__name__)
MAGIC = b"ksaS"
LAYOUT = 3
HEAD = b""
"""Name of a record's head among its parts; segments are named by their content."""


class BytesEngine(ABC):
    """Named parts of records, kept by bytes. A record is written whole or not at all, and read as of one instant.

    Raises, from every method: EngineError, when the disk or server fails.
    """

    evictions = 0
    """Records that it removed to make room; those of a server are the server's to tell."""

    @abstractmethod
    def read(self, key: bytes) -> dict[bytes, bytes]:
        """Return all parts of a record; none where it is not kept."""

    @abstractmethod
    def read_part(self, key: bytes, name: bytes) -> bytes | None:
        """Return one part."""

    @abstractmethod
    def write(self, key: bytes, parts: Mapping[bytes, bytes], gone: Iterable[bytes]) -> None:
        """Write parts of a record, and remove those named `gone`."""

    @abstractmethod
    def remove(self, prefix: bytes) -> None:
        """Remove every record whose key starts so; what was there is overwritten as soon as the engine can."""

    @abstractmethod
    def remove_ending(self, suffix: bytes) -> None:
        """Remove every record whose key ends so."""

    @abstractmethod
    def record_keys(self) -> Iterator[bytes]:
        """Yield the keys of all records, also of those written meanwhile or not."""

    @abstractmethod
    def probe(self) -> None:
        """Write something that leaves nothing behind."""

    @abstractmethod
    def num_records(self) -> int:
        """Return how many records are kept."""

    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes in use."""

    @property
    def is_available(self) -> bool:
        """Whether calls go to the disk or server; False while they are refused because it failed."""
        return True

    def suspect(self) -> None:  # noqa: B027 - most engines write whole or not at all
        """Have the next `purge` make unreadable what a crash may have left of users who have no record."""

    def purge(self) -> None:  # noqa: B027 - most engines overwrite what is removed
        """Make what was removed unreadable."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections."""


class EngineError(Exception):
    """The disk or server behind a cold store failed."""


class EngineAwayError(EngineError):
    """It failed a moment ago, and was not asked again."""


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What stands before a cold state."""

    layout: int
    owner: bytes
    generation: int
    fingerprint: str
    num_events: int
    seq: int
    chain: bytes
    last_order: tuple[int, bytes, int] | None
    marks: list[tuple[int, bytes]]
    segments: list[bytes]
    about: bytes
    parity: Parity
    vocabulary: Vocabulary


class ColdStateStore(StateStore):
    """Cold records in a `BytesEngine`.

    Args:
        engine: where the bytes are.
        models: the model of each fingerprint served, to turn bytes into states.
        salt: the event log's; records of another log are not found, and keys do not tell who it is.
        largest: bytes of a state beyond which it is not written: one user must not drive out many. None: no bound.
    """

    def __init__(self, engine: BytesEngine, models: Mapping[str, Model], salt: bytes, largest: int | None = None):
        self._misses: Counter[str] = Counter()
        self._engine = engine
        self._models = models
        self._salt = salt
        self._largest = largest
        self._writing = threading.Lock()
        self._unwritable_since: float | None = None
        self._owed: set[bytes] = set()
        self._deleted: frozenset[bytes] = frozenset()

    def get(self, owner: Owner, fingerprint: str) -> StateRecord | None:
        """Return the owner's cold record if every part of it is what it should be."""
        key = self._key(owner, fingerprint)
        try:
            parts = self._engine.read(key)
        except EngineError as error:
            _tell("read", error)
            self._misses["unavailable"] += 1
            return None
        if not parts:
            self._misses["absent"] += 1
            return None
        head = open_head(parts.pop(HEAD, b""))
        why = "damaged"
        if head is not None:
            if head.owner != key[:16]:
                why = "owner"
            elif head.fingerprint != fingerprint or fingerprint not in self._models:
                why = "fingerprint"
            elif head.parity != self._models[fingerprint].cold_parity:
                why = "parity"  # kept by a service that was set otherwise
            else:
                try:
                    return self._record(owner, head, parts)
                except StateError as error:
                    logger.warning("cold store: a record is damaged: %s", error)
        self._misses[why] += 1
        self._forget(key)
        return None

    def put(self, record: StateRecord) -> bool:
        """Write what of a record is not there yet. A cold record came from here and is not written again."""
        model = self._models.get(record.fingerprint)
        if record.cold or model is None:
            return True
        if record.parity not in ("exact", model.cold_parity):
            return True  # would be taken for better than it is
        if self._largest is not None and record.nbytes > self._largest:
            self._misses["too-large"] += 1
            return True
        key = self._key(record.owner, record.fingerprint)
        try:
            with self._writing:
                old = open_head(self._engine.read_part(key, HEAD) or b"")
                if old is not None and (old.generation, old.seq) > (record.generation, record.seq):
                    return True
                parts = model.dump(record.state)
                names = list(parts.segments)
                same = old is not None and (old.owner, old.parity) == (key[:16], model.cold_parity)
                had = set(old.segments) if old is not None and same else set()
                head = self._head(record, key[:16], names, parts.about, model.cold_parity)
                new = {name: parts.segments[name] for name in names if name not in had}
                self._engine.write(key, {HEAD: seal_head(head), **new}, had.difference(names))
            self._unwritable_since = None
            return True
        except EngineError as error:
            self._unwritable_since = self._unwritable_since or time.monotonic()
            _tell("written", error)
            self._misses["unwritten"] += 1
            return False

    @property
    def evictions(self) -> int:
        """Records that the engine let go for want of room."""
        return self._engine.evictions

    @property
    def misses(self) -> Counter[str]:
        """Why `get` returned None."""
        return self._misses

    def drop(self, owner: Owner) -> None:
        """Forget the owner's records of every fingerprint."""
        self._forget(owner.key(self._salt))

    def retire(self, fingerprint: str) -> None:
        """Forget everyone's records of a fingerprint."""
        try:
            self._engine.remove_ending(_fingerprint_key(fingerprint))
        except EngineError as error:
            _tell("written", error)

    def owe(self, deleted: Collection[bytes]) -> None:
        """Have the next `purge` remove what a crash may have left of deleted users, by `EventLog.deleted`."""
        self._deleted = frozenset(deleted)

    def purge(self) -> bool:
        """Remove what could not be removed before, and have the engine overwrite it."""
        try:
            if self._deleted:
                self._owed.update(key for key in self._engine.record_keys() if key[:16] in self._deleted)
                self._engine.suspect()
                self._deleted = frozenset()
            for key in list(self._owed):
                self._forget(key)
            self._engine.purge()
        except EngineError as error:
            _tell("purged", error)
            return False
        return not self._owed

    @property
    def unwritable_seconds(self) -> float:
        """For how long the engine could not be written."""
        since = self._unwritable_since
        return 0.0 if since is None else time.monotonic() - since

    def probe(self) -> None:
        """Try to write to the engine."""
        try:
            self._engine.probe()
            self._unwritable_since = None
        except EngineError as error:
            self._unwritable_since = self._unwritable_since or time.monotonic()
            _tell("written", error)

    @property
    def is_available(self) -> bool:
        """Whether the engine is."""
        return self._engine.is_available

    def close(self) -> None:
        """Let go of the engine."""
        self._engine.close()

    def __len__(self) -> int:
        """Return how many records are kept."""
        try:
            return self._engine.num_records()
        except EngineError:
            return 0

    @property
    def nbytes(self) -> int:
        """Bytes the engine uses."""
        try:
            return self._engine.nbytes()
        except EngineError:
            return 0

    def _key(self, owner: Owner, fingerprint: str) -> bytes:
        return owner.key(self._salt) + _fingerprint_key(fingerprint)

    def _forget(self, key: bytes) -> None:
        try:
            self._engine.remove(key)
            self._owed.discard(key)
        except EngineError as error:
            self._owed.add(key)
            _tell("written", error)

    def _head(self, record: StateRecord, owner: bytes, segments: list[bytes], about: bytes, parity: Parity) -> Head:
        order = record.last_order
        return Head(
            layout=LAYOUT,
            owner=owner,
            generation=record.generation,
            fingerprint=record.fingerprint,
            num_events=record.num_events,
            seq=record.seq,
            chain=record.chain,
            last_order=None if order is None else (order[0][0], order[0][1], order[1]),
            marks=[(mark.num_events, mark.history_hash) for mark in record.marks],
            segments=segments,
            about=about,
            parity=parity,
            vocabulary=record.vocabulary,
        )

    def _record(self, owner: Owner, head: Head, parts: dict[bytes, bytes]) -> StateRecord:
        """Return the record of a head that was found good.

        Raises:
            StateError: a segment is missing or is not what its name says.
        """
        for name in head.segments:
            if segment_name(parts.get(name, b"")) != name:
                raise StateError("segment: expected the bytes its name says, got others or none.")
        state = self._models[head.fingerprint].load(StateParts(head.about, parts))
        if state.num_events != head.num_events:
            raise StateError(f"state: expected {head.num_events} events, got {state.num_events}.")
        order = head.last_order
        return StateRecord(
            owner=owner,
            generation=head.generation,
            fingerprint=head.fingerprint,
            num_events=head.num_events,
            seq=head.seq,
            chain=head.chain,
            last_order=None if order is None else ((order[0], order[1]), order[2]),
            marks=tuple(Mark(count, digest) for count, digest in head.marks),
            state=state,
            nbytes=state.nbytes + state.seen_nbytes + state.fixed_nbytes,
            vocabulary=head.vocabulary,
            cold=True,
            parity=head.parity,
        )


def _tell(what: str, error: EngineError) -> None:
    """Log a failure; not again for every call that is refused after it."""
    if not isinstance(error, EngineAwayError):
        logger.warning("cold store: cannot be %s: %s", what, error)


def segment_name(content: bytes) -> bytes:
    """Return the name of a segment: 16 bytes of the SHA-256 of its content."""
    return hashlib.sha256(content).digest()[:16]


def seal_head(head: Head) -> bytes:
    """Return a head as bytes that tell when one of them changes."""
    body = MAGIC + msgspec.msgpack.encode(head)
    return body + hashlib.sha256(body).digest()


def open_head(sealed: bytes) -> Head | None:
    """Return the head of its bytes, or None where they are not whole or of another layout."""
    body, checksum = sealed[:-32], sealed[-32:]
    if not body.startswith(MAGIC) or hashlib.sha256(body).digest() != checksum:
        return None
    try:
        head = msgspec.msgpack.decode(body[len(MAGIC) :], type=Head)
    except msgspec.DecodeError:
        return None
    return head if head.layout == LAYOUT else None


def _fingerprint_key(fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode()).digest()[:8]
