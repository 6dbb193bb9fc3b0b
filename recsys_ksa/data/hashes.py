# pyright: standard
"""The hashes that identify a prepared data set.

Each user's row has a digest, and `content_hash` is over these: a change hashes the rows it touches, and nothing else.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys_ksa.schema import SPLIT_COLUMNS

HASHED_LISTS = ("item_index", "timestamp", "tie", "event_id", "event_type", "value")
Digests = NDArray[np.uint8]
"""SHA-256 of each row, uint8 [U, 32]."""
Split = dict[str, dict[str, int]]


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_digests(histories: pa.Table) -> Digests:
    """Return the SHA-256 of each row of a table in `schema.histories_schema`.

    A row is: user_index and number of events (int64), length of user_id, then user_id, item_index (int32), timestamp
    (int64), tie, and where the log has them event_id, event_type (int8) and value (float32). Numbers are
    little-endian, lengths int64; a list of strings is the lengths, then all bytes. Split positions are not in it.
    """
    rows = histories.num_rows
    if rows == 0:
        return np.empty((0, 32), dtype=np.uint8)
    ids = _Cells.of_strings(_whole(histories.column("user_id")).cast(pa.large_string()))
    names = [name for name in HASHED_LISTS if name in histories.schema.names]
    lists = [_Cells.of_lists(_whole(histories.column(name))) for name in names]
    heads = np.empty((rows, 3), dtype="<i8")
    heads[:, 0] = histories.column("user_index").to_numpy()
    heads[:, 1] = np.diff(lists[0].offsets)
    heads[:, 2] = np.diff(ids.offsets)
    # One hash of joined pieces: a call a piece costs more than the hash.
    columns = [_Cells(heads.reshape(-1).view(np.uint8).data, np.arange(rows + 1) * 24), ids]
    columns += [cells for cell in lists for cells in (cell.lengths, cell) if cells is not None]
    pieces = zip(*(cells.pieces() for cells in columns))
    digests = b"".join([hashlib.sha256(b"".join(row)).digest() for row in pieces])
    return np.frombuffer(digests, dtype=np.uint8).reshape(rows, 32)


def content_hash(names: Sequence[str], digests: Digests) -> str:
    """Return the SHA-256 of a data set: of its columns' names, then of the digests of all rows, users by index.

    Args:
        names: columns of the rows, of which the hashed lists count.
        digests: `row_digests`.
    """
    hashed = ",".join(name for name in HASHED_LISTS if name in names)
    digest = hashlib.sha256(f"recsys-ksa histories 2\n{hashed}\n".encode())
    digest.update(np.ascontiguousarray(digests).data)
    return digest.hexdigest()


def split_hash(split: Split, user_index: NDArray[np.int64], positions: Mapping[str, NDArray[np.int32]]) -> str:
    """Return the SHA-256 of the split's definition and of each user's positions, users by index."""
    digest = hashlib.sha256(json.dumps(split, sort_keys=True).encode() + b"\n")
    digest.update(user_index.astype("<i8").tobytes())
    for name in SPLIT_COLUMNS:
        digest.update(name.encode() + b"\n")
        digest.update(positions[name].astype("<i4").tobytes())
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
        return map(self._values.__getitem__, map(slice, self._ends, self._ends[1:]))

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


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _strings(array: pa.Array) -> tuple[NDArray[np.int64], memoryview]:
    """large_binary or large_string [N] -> ends in bytes, int64 [N + 1], and the bytes."""
    _, ends, values = array.buffers()
    if ends is None:
        return np.zeros(1, dtype=np.int64), memoryview(b"")
    ends = np.frombuffer(ends, dtype="<i8")[array.offset : array.offset + len(array) + 1]
    return ends, memoryview(b"" if values is None else values)
