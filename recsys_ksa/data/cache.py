# pyright: standard
"""The loader's copy of the histories: one uncompressed Arrow IPC record batch, users by index, hash-checked.

    cache/histories.arrow   what training and evaluation map into memory (a later version's: histories-00003.arrow)
    cache/ties.arrow        what the loader does not need, for increments: lists of tie and event_id, batches of users
    cache/histories.json    sha256 of these files, and the content and split hash they were built from

The caches can always be rebuilt from histories/part-*.parquet, in bounded memory: the loader's is laid out first
(all sizes are known), then each block of users is written into its place.
"""

import json
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys_ksa.data.hashes import ContentHash, file_hash, split_hash
from recsys_ksa.data.manifest import Manifest, versioned
from recsys_ksa.data.parts import Source, blocks, checked_parts, with_global_split
from recsys_ksa.errors import DataError
from recsys_ksa.schema import SPLIT_COLUMNS

CACHE = "cache/histories.arrow"
TIES = "cache/ties.arrow"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """What merging all parts told."""

    content_hash: str
    split_hash: str
    lengths: NDArray[np.int64]
    """Events of each user, by user_index."""


def write_cache(directory: Path, sources: Sequence[Source], split: dict[str, dict[str, int]], version: int) -> Merged:
    """Merge histories by user_index into the caches and their seal; return their hashes and lengths.

    A reader sees the old caches or the new ones whole.

    Args:
        directory: the data set.
        sources: of all histories, such as the parts of all buckets (`parts.checked_parts`).
        split: the cuts of protocol `global`; positions in the sources may be of an earlier version.
        version: the data set's version; decides the names.
    """
    path, ties = (directory / versioned(name, version) for name in (CACHE, TIES))
    path.parent.mkdir(exist_ok=True)
    unfinished, unfinished_ties = (each.with_name(f".{each.name}.{os.getpid()}") for each in (path, ties))
    try:
        merged = _merge_into(unfinished, unfinished_ties, sources, split)
        with ThreadPoolExecutor(1) as other:
            ties_hash = other.submit(file_hash, unfinished_ties)
            seal = {
                "sha256": file_hash(unfinished),
                "ties_sha256": ties_hash.result(),
                "content_hash": merged.content_hash,
                "split_hash": merged.split_hash,
            }
        unfinished_seal = unfinished.with_suffix(".seal")
        unfinished_seal.write_text(json.dumps(seal, indent=2) + "\n", encoding="utf-8")
        unfinished_ties.replace(ties)
        unfinished.replace(path)
        unfinished_seal.replace(path.with_suffix(".json"))
    except BaseException:
        unfinished.unlink(missing_ok=True)
        unfinished_ties.unlink(missing_ok=True)
        raise
    return merged


def map_cache(directory: Path, manifest: Manifest, *, checked: bool = False) -> pa.RecordBatch:
    """Return the cached histories as one memory-mapped record batch; rebuild the cache where it is missing or old.

    Args:
        directory: the data set.
        manifest: of the version to map.
        checked: the caller knows that the file is what its seal says.

    Raises:
        DataError: the cache was altered, or a part that a rebuild needs is missing or altered.
    """
    directory = Path(directory)
    path = directory / versioned(CACHE, manifest.version)
    seal = _sealed(directory, manifest)
    if not checked:
        _check_seal(path, seal["sha256"])
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return reader.get_batch(0)


def checked_caches(directory: Path, manifest: Manifest) -> tuple[Path, Path]:
    """Return the loader's cache and that of ties; rebuild both where one is missing or old.

    Raises:
        DataError: as `map_cache` says.
    """
    path, ties = (directory / versioned(name, manifest.version) for name in (CACHE, TIES))
    seal = _sealed(directory, manifest)
    if not (ties.is_file() and seal["ties_sha256"]):
        _rebuild(directory, manifest)
        seal = _sealed(directory, manifest)
    with ThreadPoolExecutor(1) as other:
        checked = other.submit(_check_seal, ties, seal["ties_sha256"])
        _check_seal(path, seal["sha256"])
        checked.result()
    return path, ties


def _sealed(directory: Path, manifest: Manifest) -> dict[str, str]:
    """Return the seal of the version's caches; rebuild them where they are missing or of other data."""
    path = directory / versioned(CACHE, manifest.version)
    seal = _read_seal(path)
    if seal is None or (seal["content_hash"], seal["split_hash"]) != (manifest.content_hash, manifest.split_hash):
        _log.warning("%s: building %s from the parts", directory, path.relative_to(directory))
        _rebuild(directory, manifest)
        seal = _read_seal(path)
        assert seal is not None
    return seal


def _check_seal(path: Path, expected: str) -> None:
    found = file_hash(path)
    if found != expected:
        raise DataError(
            f"{path}: expected sha256 {expected[:12]}..., got {found[:12]}...: the cache was altered. "
            f"Delete {path.parent}; it is rebuilt at the next use."
        )


def read_parts(directory: Path, manifest: Manifest) -> pa.Table:
    """Return the histories of the parts, users by index, with everything an event has.

    Raises:
        DataError: a part is missing or altered, or all together are not what the manifest says.
    """
    parts = checked_parts(Path(directory), manifest)
    tables = [with_global_split(block, manifest.split) for block in blocks(parts)]
    digest = ContentHash(tables[0].schema)
    for table in tables:
        digest.update(table)
    _check_content(directory, manifest, digest.hexdigest())
    return pa.concat_tables(tables).combine_chunks()


def _rebuild(directory: Path, manifest: Manifest) -> None:
    parts = checked_parts(directory, manifest)
    try:
        merged = write_cache(directory, parts, manifest.split, manifest.version)
    except OSError as error:
        raise DataError(
            f"{directory / 'cache'}: expected to write the cache, got: {error.strerror}. Make the folder writable once."
        ) from error
    _check_content(directory, manifest, merged.content_hash)


def _check_content(directory: Path, manifest: Manifest, found: str) -> None:
    if found != manifest.content_hash:
        raise DataError(
            f"{directory}: expected content_hash {manifest.content_hash[:12]}..., its parts give {found[:12]}.... "
            "Prepare the data set again."
        )


def _merge_into(path: Path, ties: Path, sources: Sequence[Source], split: dict[str, dict[str, int]]) -> Merged:
    """Write the sources' newest rows into `path` and `ties`."""
    sizes = [source.sizes() for source in sources]
    num_events, id_bytes = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    num_users = sum(int(source.newest.sum()) for source in sources)
    schema = sources[0].schema
    layout = _Layout(path, schema, num_users, num_events, id_bytes)
    digest = ContentHash(schema)
    lengths = []
    kept = [name for name in ("tie", "event_id") if name in schema.names]
    with (
        path.open("r+b") as file,
        pa.OSFile(str(ties), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([schema.field(name) for name in kept])) as writer,
    ):
        for block in _read_ahead(blocks(sources)):
            digest.update(block)
            layout.write(file.fileno(), with_global_split(block, split))
            writer.write_table(block.select(kept))
            lengths.append(pc.call_function("list_value_length", [block.column("item_index")]).to_numpy())
    with pa.memory_map(str(path)) as source:
        positions = split_hash(split, pa.ipc.open_file(source).get_batch(0))
    all_lengths = np.concatenate(lengths).astype(np.int64) if lengths else np.empty(0, dtype=np.int64)
    return Merged(digest.hexdigest(), positions, all_lengths)


def _read_ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the tables, the next one being read meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = reader.submit(next, tables, None)
            yield table


class _Layout:
    """An Arrow IPC file of one record batch whose buffers are filled in later, front to back."""

    def __init__(self, path: Path, schema: pa.Schema, num_users: int, num_events: int, id_bytes: int) -> None:
        names = ["user_id", "user_index", "item_index", "timestamp", "event_type", "value", *SPLIT_COLUMNS]
        self._schema = pa.schema([schema.field(name) for name in names if name in schema.names])
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
    """Write the record batch with zeros for values; an untouched anonymous map of zeros takes no memory."""
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
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def _ends(num_users: int, last: int, kind: str) -> pa.Buffer:
    """Offsets that are 0 but for the last: what Arrow needs to write all values."""
    held = _untouched((num_users + 1) * np.dtype(kind).itemsize)
    np.frombuffer(held, dtype=kind)[-1] = last
    return pa.py_buffer(held)


def _untouched(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a shared one takes memory when read


def _read_seal(path: Path) -> dict[str, str] | None:
    if not path.is_file():
        return None
    try:
        seal = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        needed = {name: str(seal[name]) for name in ("sha256", "content_hash", "split_hash")}
        return needed | {"ties_sha256": str(seal.get("ties_sha256", ""))}
    except (OSError, ValueError, KeyError, TypeError):
        return None
