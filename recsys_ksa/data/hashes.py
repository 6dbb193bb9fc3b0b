# pyright: standard
"""The hashes that identify a prepared data set, computed a block of users at a time."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ksa.schema import SPLIT_COLUMNS

_HASHED_LISTS = ("item_index", "timestamp", "tie", "event_id", "event_type")
Split = dict[str, dict[str, int]]


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ContentHash:
    """SHA-256 of a histories table's canonical rows, fed with blocks of users in order of user_index.

    Each user's row is: user_index and number of events (int64), user_id, then item_index (int32), timestamp
    (int64), tie, and where the log has them event_id and event_type (int8). Numbers are little-endian; a string is
    its length as int64 and its bytes; a list of strings is the lengths as int64, then all bytes. Split positions
    have a hash of their own.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._names = [name for name in _HASHED_LISTS if name in schema.names]
        self._digest = hashlib.sha256(b"recsys-ksa histories 1\n")
        self._digest.update((",".join(self._names) + "\n").encode())

    def update(self, block: pa.Table) -> None:
        """Add a block in `schema.histories_schema`, its users by index and after all users before."""
        if block.num_rows == 0:
            return
        user_index = block.column("user_index").to_numpy()
        user_ids = block.column("user_id").to_pylist()
        columns = [_Cells.of(block.column(name)) for name in self._names]
        for row, user_id in enumerate(user_ids):
            raw = user_id.encode()
            num_events = columns[0].num_events(row)
            self._digest.update(np.array([user_index[row], num_events, len(raw)], dtype="<i8").tobytes() + raw)
            for column in columns:
                column.update(self._digest, row)

    def hexdigest(self) -> str:
        """Return the hash of everything so far, in hexadecimal."""
        return self._digest.hexdigest()


def content_hash(histories: pa.Table) -> str:
    """Return `ContentHash` of a whole table, whatever the order of its users."""
    digest = ContentHash(histories.schema)
    digest.update(histories.sort_by("user_index"))
    return digest.hexdigest()


def split_hash(split: Split, histories: pa.Table | pa.RecordBatch) -> str:
    """Return the SHA-256 of the split's definition and of each user's positions (users by index, int32)."""
    table = histories.select(["user_index", *SPLIT_COLUMNS]).sort_by("user_index")
    digest = hashlib.sha256(json.dumps(split, sort_keys=True).encode() + b"\n")
    digest.update(table.column("user_index").to_numpy().astype("<i8").tobytes())
    for name in SPLIT_COLUMNS:
        digest.update(name.encode() + b"\n")
        digest.update(table.column(name).to_numpy().astype("<i4").tobytes())
    return digest.hexdigest()


class _Cells:
    """The values of one list column, ready to be cut by user without copying."""

    def __init__(self, offsets: list[int], values: memoryview, width: int, ends: np.ndarray | None) -> None:
        self._offsets, self._values, self._width, self._ends = offsets, values, width, ends

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "_Cells":
        array = pa.concat_arrays(column.chunks)
        offsets = array.offsets.to_pylist()
        flat = array.values
        if pa.types.is_large_binary(flat.type) or pa.types.is_large_string(flat.type):
            _, ends, values = flat.buffers()
            ends_array = np.frombuffer(ends, dtype="<i8")[flat.offset :] if ends is not None else np.zeros(1, "<i8")
            return cls(offsets, memoryview(values if values is not None else b""), 0, ends_array)
        numbers = np.ascontiguousarray(flat.to_numpy())
        numbers = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)
        return cls(offsets, memoryview(numbers.tobytes()), numbers.itemsize, None)

    def num_events(self, row: int) -> int:
        return self._offsets[row + 1] - self._offsets[row]

    def update(self, digest: Any, row: int) -> None:
        first, last = self._offsets[row], self._offsets[row + 1]
        if self._ends is None:
            digest.update(self._values[first * self._width : last * self._width])
        else:
            ends = self._ends[first : last + 1]
            digest.update(np.diff(ends).tobytes())
            digest.update(self._values[int(ends[0]) : int(ends[-1])])
