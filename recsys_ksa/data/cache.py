# pyright: standard
"""The loader's copy of the histories: one uncompressed Arrow IPC record batch, users by index, hash-checked.

    cache/histories.arrow   what training and evaluation map into memory (a later version's: histories-00003.arrow)
    cache/histories.json    its sha256, and the content and split hash it was built from

`ksa prepare` writes it; after a change it is built by whoever opens the data set first, from the rows (`rows.py`), in
bounded memory: it is laid out first (all sizes are known), then each block of users is written into its place.
"""

import io
import json
import logging
import mmap
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ksa.data.ahead import map_ahead
from recsys_ksa.data.hashes import content_hash, file_hash, row_digests
from recsys_ksa.data.jagged_arrays import offsets_of
from recsys_ksa.data.manifest import Manifest, versioned
from recsys_ksa.data.parts import blocks, checked_parts, with_global_split
from recsys_ksa.data.rows import Overview, Rows, altered, hash_content, open_rows
from recsys_ksa.errors import DataError
from recsys_ksa.schema import SPLIT_COLUMNS

CACHE = "cache/histories.arrow"
BLOCK_EVENTS = 1 << 20
"""Events that are put in order at a time, about."""
_LARGE = 1 << 16
"""Bytes of what is no metadata."""
_log = logging.getLogger(__name__)


def write_cache(directory: Path, rows: Sequence[Rows], overview: Overview, version: int) -> None:
    """Write the newest of some rows, users by index, as the loader's copy, and its seal.

    A reader sees the old copy or the new one whole.

    Args:
        directory: the data set.
        rows: of all its parts.
        overview: of these rows.
        version: the data set's version; decides the name.
    """
    path = directory / versioned(CACHE, version)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _lay_out(unfinished, rows, overview)
        seal = {
            "sha256": file_hash(unfinished),
            "content_hash": overview.content_hash,
            "split_hash": overview.split_hash,
        }
        unfinished_seal = unfinished.with_suffix(".seal")
        unfinished_seal.write_text(json.dumps(seal, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
        unfinished_seal.replace(path.with_suffix(".json"))
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def map_cache(directory: Path, manifest: Manifest, *, checked: bool = False) -> pa.RecordBatch:
    """Return the cached histories as one memory-mapped record batch; build the copy where it is missing or old.

    Args:
        directory: the data set.
        manifest: of the version to map.
        checked: the caller knows that the file is what its seal says.

    Raises:
        DataError: the cache was altered, or a part that is needed to build it is missing or altered.
    """
    directory = Path(directory)
    path = directory / versioned(CACHE, manifest.version)
    sha256 = _sealed(path, manifest)
    if sha256 is None:
        _log.warning("%s: building %s", directory, path.relative_to(directory))
        _build(directory, manifest)
        sha256 = _sealed(path, manifest)
        assert sha256 is not None
    if not checked:
        found = file_hash(path)
        if found != sha256:
            raise altered(path)
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return reader.get_batch(0)


def checked_rows(directory: Path, manifest: Manifest) -> list[Rows]:
    """Return the rows of a data set; the digests beside them are those of the content hash.

    Whoever reads a row compares it with its digest.

    Raises:
        DataError: the cache was altered, or a part that a missing file needs is missing or altered.
    """
    rows = open_rows(directory, manifest.files)
    if not rows:
        raise DataError(f"{directory}: expected histories/part-*.parquet in the manifest, got none. Prepare it again.")
    _check_content(directory, manifest, hash_content(rows))
    return rows


def read_parts(directory: Path, manifest: Manifest) -> pa.Table:
    """Return the histories of the parts, users by index, with everything an event has.

    Raises:
        DataError: a part is missing or altered, or all together are not what the manifest says.
    """
    parts = checked_parts(Path(directory), manifest)
    table = pa.concat_tables([with_global_split(block, manifest.split) for block in blocks(parts)]).combine_chunks()
    _check_content(directory, manifest, content_hash(table.schema.names, row_digests(table)))
    return table


def _sealed(path: Path, manifest: Manifest) -> str | None:
    """Return the sha256 of the copy; None where it is missing or of other data."""
    if not path.is_file():
        return None
    try:
        seal = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        made_of = seal["content_hash"], seal["split_hash"]
        return str(seal["sha256"]) if made_of == (manifest.content_hash, manifest.split_hash) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(directory: Path, manifest: Manifest) -> None:
    rows = checked_rows(directory, manifest)
    for _ in map_ahead(Rows.check, rows):
        pass
    try:
        write_cache(directory, rows, Overview.of(rows, manifest.split), manifest.version)
    except OSError as error:
        raise DataError(
            f"{directory / 'cache'}: expected to write the cache, got: {error.strerror}. Make the folder writable once."
        ) from error


def _check_content(directory: Path, manifest: Manifest, found: str) -> None:
    if found != manifest.content_hash:
        raise DataError(
            f"{directory}: expected content_hash {manifest.content_hash[:12]}..., its rows give {found[:12]}...: the "
            f"cache or the manifest was altered. Delete {Path(directory) / 'cache'}; else prepare the data set again."
        )


def _lay_out(path: Path, rows: Sequence[Rows], overview: Overview) -> None:
    """Write the newest rows, users by index, into `path`."""
    ids = [each.column("user_id").filter(pa.array(each.newest)) for each in rows]
    id_bytes = sum(pc.call_function("binary_length", [each]).to_numpy().sum() for each in ids)
    offsets = offsets_of(overview.lengths)
    layout = _Layout(path, rows[0].schema, len(overview.lengths), int(offsets[-1]), int(id_bytes))
    cuts = np.searchsorted(offsets, np.arange(0, offsets[-1], BLOCK_EVENTS))
    cuts = np.unique(np.append(cuts, len(overview.lengths))).tolist()

    def block(ends: tuple[int, int]) -> pa.Table:
        return _in_order(rows, overview, slice(*ends), layout.names)

    with path.open("r+b") as file:
        for table in map_ahead(block, pairwise(cuts)):
            layout.write(file.fileno(), table)


def _in_order(rows: Sequence[Rows], overview: Overview, which: slice, names: Sequence[str]) -> pa.Table:
    """Return some users' rows, by index, their positions by the cuts of now."""
    user_index = overview.user_index[which]
    there = [name for name in names if name not in SPLIT_COLUMNS]
    found = [each.between(int(user_index[0]), int(user_index[-1]), there) for each in rows]
    table = pa.concat_tables(found)
    table = table.take(np.argsort(table.column("user_index").to_numpy()))
    for name in SPLIT_COLUMNS:
        table = table.append_column(name, pa.array(overview.positions[name][which]))
    for each in rows:
        each.release()
    return table


class _Layout:
    """An Arrow IPC file of one record batch whose buffers are filled in later, front to back."""

    def __init__(self, path: Path, schema: pa.Schema, num_users: int, num_events: int, id_bytes: int) -> None:
        names = ["user_id", "user_index", "item_index", "timestamp", "event_type", "value", *SPLIT_COLUMNS]
        self._schema = pa.schema([schema.field(name) for name in names if name in schema.names])
        self.names: list[str] = self._schema.names
        self._users = self._events = self._id_bytes = 0
        _write_zeros(path, self._schema, num_users, num_events, id_bytes)
        with pa.memory_map(str(path)) as source:
            start = source.read_buffer(1).address  # a view of the map, so addresses are places in the file
            batch = pa.ipc.open_file(source).get_batch(0)
            # Per column, the place of each buffer in the file, validity (which no column has) left out.
            self._places: dict[str, list[int]] = {
                name: [buffer.address - start for buffer in batch.column(name).buffers() if buffer is not None]
                for name in self._schema.names
            }

    def write(self, descriptor: int, block: pa.Table) -> None:
        """Write the next block of users into its place."""
        num_events = num_bytes = 0
        for field in self._schema:
            places, column = self._places[field.name], pa.concat_arrays(block.column(field.name).chunks)
            if pa.types.is_large_list(field.type):
                offsets, values = column.offsets.to_numpy(), column.values.to_numpy()[_span(column)]
                _put(descriptor, places[0], self._users, offsets - offsets[0] + self._events)
                _put(descriptor, places[1], self._events, values)
                num_events = len(values)
            elif pa.types.is_string(field.type):
                _, ends, ids = column.buffers()
                ends = np.frombuffer(ends, dtype="<i4")[column.offset : column.offset + len(column) + 1]
                _put(descriptor, places[0], self._users, ends - ends[0] + np.int32(self._id_bytes))
                num_bytes = int(ends[-1] - ends[0])
                if num_bytes:
                    _put(descriptor, places[1], self._id_bytes, np.frombuffer(ids, dtype=np.uint8)[ends[0] : ends[-1]])
            else:
                _put(descriptor, places[0], self._users, column.to_numpy())
        self._users += block.num_rows
        self._events += num_events
        self._id_bytes += num_bytes


def _span(lists: pa.LargeListArray) -> slice:
    """Return which of a list column's values are its own."""
    return slice(lists.offsets[0].as_py(), lists.offsets[-1].as_py())


def _put(descriptor: int, place: int, index: int, values: np.ndarray) -> None:
    """Write values so that the first becomes element `index` of the buffer at `place`."""
    at, raw = place + index * values.itemsize, np.ascontiguousarray(values).view(np.uint8).data
    while raw:
        written = os.pwrite(descriptor, raw, at)
        raw, at = raw[written:], at + written


def _write_zeros(path: Path, schema: pa.Schema, num_users: int, num_events: int, id_bytes: int) -> None:
    """Write the record batch with zeros or holes for values; an untouched anonymous map of zeros takes no memory."""
    zeros = pa.py_buffer(_untouched(max(8 * num_users, 8 * num_events, id_bytes, 1)))

    def column(kind: pa.DataType) -> pa.Array:
        if pa.types.is_large_list(kind):
            values = pa.Array.from_buffers(kind.value_type, num_events, [None, zeros])
            return pa.Array.from_buffers(
                kind, num_users, [None, _ends(num_users, num_events, "<i8")], children=[values]
            )
        if pa.types.is_string(kind):
            return pa.Array.from_buffers(kind, num_users, [None, _ends(num_users, id_bytes, "<i4"), zeros])
        return pa.Array.from_buffers(kind, num_users, [None, zeros])

    batch = pa.RecordBatch.from_arrays([column(kind) for kind in schema.types], schema=schema)
    with path.open("wb", buffering=0) as file:
        with pa.PythonFile(_Holes(file), "w") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        file.truncate(file.tell())


class _Holes(io.RawIOBase):
    """Writes to a file what is small, and leaves holes for what is large: the values, which come later."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > _LARGE:
            self._file.seek(size, os.SEEK_CUR)
        else:
            self._file.write(data)
        return size


def _ends(num_users: int, last: int, kind: str) -> pa.Buffer:
    """Offsets that are 0 but for the last: what Arrow needs to write all values."""
    held = _untouched((num_users + 1) * np.dtype(kind).itemsize)
    np.frombuffer(held, dtype=kind)[-1] = last
    return pa.py_buffer(held)


def _untouched(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a shared one takes memory when read
