# pyright: standard
"""The hashes that identify a prepared data set, computed a block of users at a time."""

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys_ksa.schema import SPLIT_COLUMNS

_HASHED_LISTS = ("item_index", "timestamp", "tie", "event_id", "event_type", "value")
Split = dict[str, dict[str, int]]


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ContentHash:
    """SHA-256 of a histories table's canonical rows, fed with blocks of users in order of user_index.

    Each user's row is: user_index and number of events (int64), user_id, then item_index (int32), timestamp
    (int64), tie, and where the log has them event_id, event_type (int8) and value (float32). Numbers are
    little-endian; a string is its length as int64 and its bytes; a list of strings is the lengths as int64, then all
    bytes. Split positions have a hash of their own.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._names = [name for name in _HASHED_LISTS if name in schema.names]
        self._digest = hashlib.sha256(b"recsys-ksa histories 1\n")
        self._digest.update((",".join(self._names) + "\n").encode())

    def update(self, block: pa.Table) -> None:
        """Add a block in `schema.histories_schema`, its users by index and after all users before."""
        if block.num_rows == 0:
            return
        ids = _Cells.of_strings(pa.concat_arrays(block.column("user_id").cast(pa.large_string()).chunks))
        lists = [_Cells.of_lists(pa.concat_arrays(block.column(name).chunks)) for name in self._names]
        heads = np.empty((block.num_rows, 3), dtype="<i8")
        heads[:, 0] = block.column("user_index").to_numpy()
        heads[:, 1] = np.diff(lists[0].offsets)
        heads[:, 2] = np.diff(ids.offsets)
        # One hash of many joined pieces: a call a piece costs more than the hash.
        columns = [_Cells(heads.reshape(-1).view(np.uint8).data, np.arange(block.num_rows + 1) * 24), ids]
        columns += [cells for cell in lists for cells in (cell.lengths, cell) if cells is not None]
        pieces = zip(*(cells.pieces() for cells in columns))
        self._digest.update(b"".join(piece for row in pieces for piece in row))

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
    """Bytes of a column, cut by user without copying."""

    def __init__(self, values: memoryview, ends: NDArray[np.int64], offsets: NDArray[np.int64] | None = None) -> None:
        self._values, self._ends = values, ends.tolist()
        self.offsets = ends if offsets is None else offsets
        """[U + 1] in values, where `ends` counts bytes."""
        self.lengths: _Cells | None = None
        """Of a list of strings: the length of each, as int64."""

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes of user after user."""
        return (self._values[first:last] for first, last in pairwise(self._ends))

    @classmethod
    def of_strings(cls, array: pa.Array) -> "_Cells":
        ends, values = _strings(array)
        return cls(values, ends)

    @classmethod
    def of_lists(cls, array: pa.LargeListArray) -> "_Cells":
        offsets, flat = array.offsets.to_numpy(), array.values
        if pa.types.is_large_binary(flat.type) or pa.types.is_large_string(flat.type):
            ends, values = _strings(flat)
            cells = cls(values, ends[offsets], offsets)
            lengths = np.diff(ends).astype("<i8", copy=False)
            cells.lengths = cls(lengths.view(np.uint8).data, 8 * offsets)
            return cells
        numbers = np.ascontiguousarray(flat.to_numpy())
        numbers = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)
        return cls(numbers.view(np.uint8).data, offsets * numbers.itemsize, offsets)


def _strings(array: pa.Array) -> tuple[NDArray[np.int64], memoryview]:
    """large_binary or large_string [N] -> ends in bytes, int64 [N + 1], and the bytes."""
    _, ends, values = array.buffers()
    if ends is None:
        return np.zeros(1, dtype=np.int64), memoryview(b"")
    ends = np.frombuffer(ends, dtype="<i8")[array.offset : array.offset + len(array) + 1]
    return ends, memoryview(b"" if values is None else values)
