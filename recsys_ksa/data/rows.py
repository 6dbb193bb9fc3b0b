# pyright: standard
"""What the parts hold, uncompressed: cache/rows-<version>-<bucket>.arrow is mapped where its part would be read.

Increments take the rows that they touch from here, and the loader's copy is laid out from here. Each row has its
digest beside it (`hashes.row_digests`), so what is taken can be compared with the content hash without reading the
rest. A file that is missing is made again from its part.

Pages that were read are given back: a file counts with what is looked at now and not with its size.
"""

import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys_ksa.data.ahead import map_ahead
from recsys_ksa.data.hashes import Digests, Split, content_hash, row_digests, split_hash
from recsys_ksa.data.manifest import check_hash
from recsys_ksa.data.parts import bucket_of, count_before, mark_newest, parts_by_bucket
from recsys_ksa.errors import DataError
from recsys_ksa.schema import SPLIT_COLUMNS

DIGEST = "digest"


def rows_name(part: str) -> str:
    """Return the name of the rows of a part: histories/part-00003-00012.parquet -> cache/rows-00003-00012.arrow."""
    return f"cache/{Path(part).stem.replace('part', 'rows')}.arrow"


def with_digests(histories: pa.Table) -> pa.Table:
    """Return rows with the digest of each."""
    digests = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), histories.num_rows, [None, pa.py_buffer(row_digests(histories).data)]
    )
    return histories.append_column(pa.field(DIGEST, pa.binary(32), nullable=False), digests)


def write_rows(rows: pa.Table, path: Path) -> None:
    """Write rows with their digests, users by index; a reader sees the whole file or none."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows.combine_chunks())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


class Rows:
    """The rows of a part. To another process it goes as its name, without what is known of other parts.

    Raises:
        DataError: the file is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            self._table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map))).read_all()
            self.users: NDArray[np.int64] = self._table.column("user_index").to_numpy().copy()
            """[rows] user_index, ascending."""
            self.offsets: NDArray[np.int64] = self._table.column("item_index").chunk(0).offsets.to_numpy()
            """[rows + 1] of the lists."""
        except (ValueError, pa.ArrowException, IndexError, KeyError) as error:
            raise altered(path) from error
        self.newest = np.ones(len(self.users), dtype=bool)
        """[rows] whether no later part has this user."""
        self.bucket = bucket_of(path.name)

    def __reduce__(self) -> tuple[type["Rows"], tuple[Path]]:
        return Rows, (self.path,)

    @property
    def names(self) -> list[str]:
        """Columns of the part, which are those of `schema.histories_schema`."""
        return [name for name in self._table.schema.names if name != DIGEST]

    def column(self, name: str) -> pa.Array:
        """Return a column, mapped."""
        return self._table.column(name).chunk(0)

    def of_newest(self, values: NDArray) -> NDArray:
        """Return values of rows, those of the newest rows."""
        return values if self.newest.all() else values[self.newest]

    @property
    def digests(self) -> Digests:
        """[rows, 32] of each row."""
        return _digests(self.column(DIGEST))

    def positions(self, split: Split) -> dict[str, NDArray[np.int32]]:
        """Return each of `schema.SPLIT_COLUMNS` by these cuts; those in the file may be of an earlier version's."""
        found = {name: self.column(name).to_numpy() for name in SPLIT_COLUMNS}
        timestamp = self.column("timestamp").values.to_numpy()
        for name, cut in zip(SPLIT_COLUMNS[2:], ("valid_start", "test_start")):
            cuts = split.get("global")
            if cuts is not None:
                found[name] = count_before(timestamp, self.offsets, cuts[cut], found[name]).astype(np.int32)
        self.release()
        return found

    @property
    def schema(self) -> pa.Schema:
        """Of the part (`schema.histories_schema`), and the digest."""
        return self._table.schema

    def between(self, first: int, last: int, names: Sequence[str]) -> pa.Table:
        """Return columns of the newest rows of users `first` to `last`, both with."""
        begin, end = np.searchsorted(self.users, [first, last + 1]).tolist()
        rows, newest = self._table.select(names).slice(begin, end - begin), self.newest[begin:end]
        return rows if newest.all() else rows.filter(pa.array(newest))

    def take(self, rows: NDArray[np.int64], names: Sequence[str]) -> pa.Table:
        """Return columns of some rows, copied."""
        taken = self._table.select(names).take(pa.array(rows))
        self.release()
        return taken

    def check(self) -> None:
        """Compare all newest rows with their digests.

        Raises:
            DataError: a row is another.
        """
        rows = self._table if self.newest.all() else self._table.filter(pa.array(self.newest))
        if len(altered_rows(rows)):
            raise altered(self.path)
        self.release()

    def release(self) -> None:
        """Give the pages back; what is read again comes from the disk's cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


def altered(path: Path) -> DataError:
    """Return the error for a file of the cache that is not what was written."""
    return DataError(
        f"{path}: expected the rows of the data set: the cache was altered. Delete {path.parent}; it is rebuilt at "
        "the next use."
    )


def altered_rows(rows: pa.Table) -> NDArray[np.int64]:
    """Return which rows are not what the digests beside them say."""
    if not rows.num_rows:
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero((row_digests(rows) != _digests(rows.column(DIGEST).combine_chunks())).any(axis=1))


def _digests(column: pa.FixedSizeBinaryArray) -> Digests:
    raw = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    return raw[32 * column.offset : 32 * (column.offset + len(column))].reshape(-1, 32)


def open_rows(directory: Path, files: Mapping[str, str], opened: Iterable[Rows] = ()) -> list[Rows]:
    """Return the rows of all parts among a data set's files, each knowing which of its rows are the newest.

    Args:
        directory: the data set.
        files: sha256 by name.
        opened: rows that need not be opened again.

    Raises:
        DataError: a part that is needed for a missing file is missing or altered, or the disk refuses.
    """
    parts = [names for _, names in sorted(parts_by_bucket(files).items())]
    there = {rows.path: rows for rows in opened}
    paths = {name: directory / rows_name(name) for name in chain.from_iterable(parts)}
    missing = [name for name, path in paths.items() if path not in there and not path.exists()]
    for _ in map_ahead(partial(_make, directory, files), missing):
        pass
    buckets = [[there.get(paths[name]) or Rows(paths[name]) for name in names] for names in parts]
    for bucket in buckets:
        mark_newest(bucket)
    return list(chain.from_iterable(buckets))


def numbered_users(rows: Sequence[Rows]) -> pa.Table:
    """Return user_id and user_index of all users, in no order."""
    columns = ["user_id", "user_index"]
    return pa.concat_tables([each.take(np.flatnonzero(each.newest), columns) for each in rows])


def _make(directory: Path, files: Mapping[str, str], part: str) -> None:
    """Make the rows of a part again."""
    target = directory / rows_name(part)
    path = check_hash(directory / part, files[part])
    try:
        target.parent.mkdir(exist_ok=True)
        write_rows(with_digests(pq.ParquetFile(path).read()), target)
    except OSError as error:
        raise DataError(
            f"{target}: expected to write the cache, got: {error.strerror}. Make the folder writable once."
        ) from error


@dataclass(frozen=True)
class Overview:
    """What all rows of a data set tell without their events, by user_index; U users."""

    user_index: NDArray[np.int64]
    """[U]"""
    lengths: NDArray[np.int64]
    """[U] events."""
    positions: dict[str, NDArray[np.int32]]
    """[U] each, by name in `schema.SPLIT_COLUMNS`."""
    content_hash: str
    split_hash: str

    @classmethod
    def of(cls, rows: Sequence[Rows], split: Split) -> "Overview":
        """Look at the newest rows of all files; positions are by these cuts."""
        order = _by_index(rows)
        found = [each.positions(split) for each in rows]
        positions = {
            name: np.concatenate([each.of_newest(columns[name]) for columns, each in zip(found, rows)])[order]
            for name in SPLIT_COLUMNS
        }
        user_index = np.concatenate([each.of_newest(each.users) for each in rows])[order]
        lengths = np.concatenate([each.of_newest(np.diff(each.offsets)) for each in rows])[order]
        return cls(user_index, lengths, positions, hash_content(rows), split_hash(split, user_index, positions))


def hash_content(rows: Sequence[Rows]) -> str:
    """Return the content hash of the newest rows of all files, by the digests beside them."""
    digests = np.concatenate([each.of_newest(each.digests) for each in rows]).take(_by_index(rows), axis=0)
    for each in rows:
        each.release()
    return content_hash(rows[0].names, digests)


def _by_index(rows: Sequence[Rows]) -> NDArray[np.int64]:
    """Return the order of the newest rows of all files by user_index."""
    return np.argsort(np.concatenate([each.of_newest(each.users) for each in rows]), kind="stable")  # runs, in order
