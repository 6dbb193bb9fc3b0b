"""Cold states in LMDB: one file, one writer, crash-safe (default sync), sized by bytes.

Keys are the record's 24 bytes and the part's name. The oldest written records make room for new ones. LMDB does not
overwrite what is removed, and what was removed may stand in the unused end of a page of somebody else's. So `remove` of
a user is followed by copying what is kept, part by part, into a new file (`compact`): the service runs it in the
background after deletions.

LMDB trusts its file: one that was cut or flipped may end the process that reads it. States are a cache, so a file that
is found damaged is started anew, and so is one that several processes in a row did not live to close.
"""

import logging
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import lmdb

from ksa_serving.cold_store import BytesEngine, EngineError
from ksa_serving.durable import sync

KEY_BYTES = 24
OWED = b"z"
"""Written with a removal: a compaction is owed, also after a crash."""
UNSURE = b"y"
"""Written where records made room for others, or a process ended in the middle of a write: pages that no record refers
to may hold anyone's bytes, also of a user who has no record."""
COPIED_AT_ONCE = 1000
"""Parts copied in a transaction by a compaction."""
PROBE = b"x"
"""Written and removed in one transaction."""
FULL_SHARE = 0.8
"""Of the size, beyond which the oldest records are removed."""
MOST_UNCLOSED = 3
"""Processes in a row that may end without closing the file, before it is taken for what ended them."""
DAMAGE = (
    *(lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PanicError),
    *(lmdb.BadTxnError, lmdb.CursorFullError, lmdb.PageFullError, lmdb.ProblemError, SystemError, struct.error),
)
"""What a damaged file makes of a call, where it does not end the process."""

logger = logging.getLogger(__name__)


class LmdbEngine(BytesEngine):
    """Records in `directory`/cold.lmdb, at most `max_bytes` large; `cold.unclosed` counts who did not live to close it.

    Raises:
        EngineError: the file cannot be opened.
    """

    def __init__(self, directory: Path, max_bytes: int):
        self._path = Path(directory) / "cold.lmdb"
        self._unclosed = Path(directory) / "cold.unclosed"
        self._max_bytes = max_bytes
        self._readers = self._writers = 0
        self._compacting = self._damaged = False
        self._idle = threading.Condition(threading.RLock())
        try:
            unclosed = len(self._unclosed.read_bytes()) if self._unclosed.exists() else 0
            self._unclosed.write_bytes(b"x" * (unclosed + 1))
            if unclosed >= MOST_UNCLOSED:
                self._start_anew(f"{unclosed} processes in a row did not close it")
                return
            try:
                self._open()
                if unclosed:
                    with self._env.begin(write=True) as txn:
                        txn.put(UNSURE, b"", db=self._written)
            except (lmdb.Error, *DAMAGE) as error:
                self._start_anew(error)
        except (lmdb.Error, OSError) as error:
            raise EngineError(f"{self._path}: {error}") from error

    def _open(self) -> None:
        self._env = lmdb.open(
            str(self._path), map_size=self._max_bytes, subdir=False, max_dbs=2, mode=0o600, max_spare_txns=8
        )
        used = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        has = self._path.stat().st_size
        if 0 < has < used:  # reading past the end would end the process
            raise lmdb.CorruptedError(f"expected {used} bytes, got {has}")
        self._env.reader_check()
        self._parts = self._env.open_db(b"parts")
        self._written = self._env.open_db(b"written")
        with self._env.begin() as txn:
            self.needs_compaction = txn.get(OWED, db=self._written) is not None

    def _start_anew(self, why: object) -> None:
        """Put an empty file in place of one that cannot be trusted. Nobody reads or writes."""
        logger.warning("cold store: %s is damaged, and started anew: %s", self._path.name, why)
        self._close()
        for path in (self._path, self._lock_path):
            path.unlink(missing_ok=True)
        self._open()
        self._unclosed.write_bytes(b"x")
        self._damaged = False

    def _close(self) -> None:
        if hasattr(self, "_env"):
            self._env.close()

    @property
    def _lock_path(self) -> Path:
        return self._path.with_name(self._path.name + "-lock")

    def read(self, key: bytes) -> dict[bytes, bytes]:
        """Return all parts of a record, of one instant."""
        with self._transaction(write=False) as txn, txn.cursor(self._parts) as cursor:
            parts: dict[bytes, bytes] = {}
            found = cursor.set_range(key)
            while found and cursor.key()[:KEY_BYTES] == key:
                parts[bytes(cursor.key()[KEY_BYTES:])] = bytes(cursor.value())
                found = cursor.next()
            return parts

    def read_part(self, key: bytes, name: bytes) -> bytes | None:
        """Return one part."""
        with self._transaction(write=False) as txn:
            found = txn.get(key + name, db=self._parts)
            return None if found is None else bytes(found)

    def write(self, key: bytes, parts: Mapping[bytes, bytes], gone: Iterable[bytes]) -> None:
        """Write parts of a record, room made by removing the oldest ones."""
        size = sum(map(len, parts.values()))
        with self._transaction(write=True) as txn:  # of its own: pages are free for the next transaction only
            self._make_room(txn, size)
        with self._transaction(write=True) as txn:
            for name in gone:
                txn.delete(key + name, db=self._parts)
            for name, content in parts.items():
                txn.put(key + name, content, db=self._parts)
            self._touch(txn, key)

    def remove(self, prefix: bytes) -> None:
        """Remove records whose keys start with `prefix`."""
        with self._transaction(write=True) as txn, txn.cursor(self._parts) as cursor:
            gone: set[bytes] = set()
            found = cursor.set_range(prefix)
            while found and bytes(cursor.key()).startswith(prefix):
                gone.add(bytes(cursor.key()[:KEY_BYTES]))
                found = cursor.delete() and bool(cursor.key())
            for key in gone:
                self._untouch(txn, key)
            if gone or self._is_unsure(txn):
                txn.put(OWED, b"", db=self._written)
                self.needs_compaction = True

    def remove_ending(self, suffix: bytes) -> None:
        """Remove records whose keys end with `suffix`."""
        for key in list(self.record_keys()):
            if key.endswith(suffix):
                self.remove(key)

    def record_keys(self) -> Iterator[bytes]:
        """Yield the keys of all records."""
        with self._transaction(write=False) as txn, txn.cursor(self._written) as cursor:
            for name, value in cursor:
                if name[:1] != b"n":  # they come first
                    return
                yield bytes(value)

    def probe(self) -> None:
        """Commit a transaction that writes a page."""
        with self._transaction(write=True) as txn:
            txn.put(PROBE, b"", db=self._written)
            txn.delete(PROBE, db=self._written)

    def num_records(self) -> int:
        """Return how many records are kept."""
        with self._transaction(write=False) as txn:
            notes = sum(txn.get(note, db=self._written) is not None for note in (OWED, UNSURE))
            return (txn.stat(self._written)["entries"] - notes) // 2

    def nbytes(self) -> int:
        """Return the bytes in use."""
        with self._transaction(write=False) as txn:
            return self._used(txn)

    def suspect(self) -> None:
        """Have the next `purge` overwrite what a crash may have left of users who have no record."""
        with self._transaction(write=False) as txn:
            self.needs_compaction |= self._is_unsure(txn)

    def purge(self) -> None:
        """Compact if something was removed since."""
        if self.needs_compaction:
            self.compact()

    def compact(self) -> None:
        """Copy what is kept to a new file in place of the old, whose removed records are gone with it.

        Records can be read meanwhile; writing fails at once, for a cache may lose a write.
        """
        with self._idle:
            self._compacting = True
            self._idle.wait_for(lambda: not self._writers)
        new = self._path.with_suffix(".new")
        try:
            new.unlink(missing_ok=True)
            self._copy(new)
            sync(new)
            with self._idle:
                self._idle.wait_for(lambda: not self._readers)
                self._damaged = True  # until it is open again
                self._env.close()
                os.replace(new, self._path)
                sync(self._path.parent)
                self._lock_path.unlink(missing_ok=True)
                self._open()
                self._damaged = False
        except (lmdb.Error, OSError, *DAMAGE) as error:
            self._damaged |= isinstance(error, DAMAGE)
            raise EngineError(f"{self._path}: {error}") from error
        finally:
            self._compacting = False

    def _copy(self, path: Path) -> None:
        """Write what is kept into a new file: LMDB's own copy takes pages whole, with what stood there before.

        Not `OWED` and `UNSURE`, which it settles.
        """
        copy = lmdb.open(
            str(path), map_size=self._max_bytes, subdir=False, max_dbs=2, mode=0o600, lock=False, sync=False
        )
        try:
            with self._env.begin() as old:
                for name, source in ((b"parts", self._parts), (b"written", self._written)):
                    target = copy.open_db(name)
                    with old.cursor(source) as cursor:
                        kept = (pair for pair in cursor if source is self._parts or pair[0] not in (OWED, UNSURE))
                        while some := list(islice(kept, COPIED_AT_ONCE)):
                            with copy.begin(write=True) as txn, txn.cursor(target) as writer:
                                writer.putmulti(some, append=True)
            copy.sync(True)
        finally:
            copy.close()

    def close(self) -> None:
        """Close the file."""
        with self._idle:
            self._idle.wait_for(lambda: not self._readers and not self._writers)
            self._env.close()
            self._unclosed.unlink(missing_ok=True)

    @contextmanager
    def _transaction(self, write: bool) -> Iterator[lmdb.Transaction]:
        with self._idle:
            if self._damaged:
                self._mend()
            if write and self._compacting:
                raise EngineError(f"{self._path}: it is being compacted")
            self._writers += write
            self._readers += not write
        try:
            with self._env.begin(write=write) as txn:
                yield txn
        except (lmdb.Error, *DAMAGE) as error:
            self._damaged |= isinstance(error, DAMAGE)
            raise EngineError(f"{self._path}: {error}") from error
        finally:
            with self._idle:
                self._writers -= write
                self._readers -= not write
                self._idle.notify_all()

    def _mend(self) -> None:
        if self._readers or self._writers or self._compacting:
            raise EngineError(f"{self._path}: it is damaged")
        try:
            self._start_anew("it could not be read or written")
        except (lmdb.Error, OSError) as error:
            raise EngineError(f"{self._path}: {error}") from error

    def _used(self, txn: lmdb.Transaction) -> int:
        """Bytes of the pages that hold something."""
        page = self._env.stat()["psize"]
        stats = (txn.stat(self._parts), txn.stat(self._written))
        return page * sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)

    def _make_room(self, txn: lmdb.Transaction, size: int) -> None:
        limit = int(FULL_SHARE * self._max_bytes) - 2 * size
        if self._used(txn) <= limit:
            return
        with txn.cursor(self._written) as written:
            found = written.first()
            while found and written.key()[:1] == b"n" and self._used(txn) > limit:
                key = bytes(written.value())
                self._remove_parts(txn, key)
                self._untouch(txn, key)
                self.evictions += 1
                found = written.first()
            txn.put(UNSURE, b"", db=self._written)

    def _is_unsure(self, txn: lmdb.Transaction) -> bool:
        return txn.get(UNSURE, db=self._written) is not None

    def _remove_parts(self, txn: lmdb.Transaction, key: bytes) -> None:
        with txn.cursor(self._parts) as cursor:
            found = cursor.set_range(key)
            while found and cursor.key()[:KEY_BYTES] == key:
                found = cursor.delete() and bool(cursor.key())

    def _touch(self, txn: lmdb.Transaction, key: bytes) -> None:
        """Put a record at the end of the order in which room is made: n<number> -> record, r<record> -> number."""
        self._untouch(txn, key)
        with txn.cursor(self._written) as cursor:
            last = 0
            if cursor.set_range(b"r"):
                found = cursor.prev()
            else:
                found = cursor.last()
            if found and cursor.key()[:1] == b"n":
                (last,) = struct.unpack(">Q", cursor.key()[1:])
        number = struct.pack(">Q", last + 1)
        txn.put(b"n" + number, key, db=self._written)
        txn.put(b"r" + key, number, db=self._written)

    def _untouch(self, txn: lmdb.Transaction, key: bytes) -> None:
        number = txn.get(b"r" + key, db=self._written)
        if number is not None:
            txn.delete(b"n" + number, db=self._written)
            txn.delete(b"r" + key, db=self._written)
