"""Writing a data set so that it is there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ksa.data.hashes import file_hash
from recsys_ksa.data.parts import ROW_GROUP_EVENTS
from recsys_ksa.durable import sync
from recsys_ksa.errors import DataError

WORK = ".work"
"""Folder inside a data set where a log is worked on; gone at the end."""
PART_OPTIONS: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
"""How a part is written."""


def refuse_existing(target: Path) -> None:
    """Refuse a data set that is already there.

    Raises:
        DataError: `target` exists.
    """
    if target.exists() or target.is_symlink():
        raise DataError(
            f"{target}: expected a path that does not exist yet, got an existing one. Remove it or choose another."
        )


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target` to write into; on success it is synced and renamed, else removed.

    A process that is killed leaves at most the hidden sibling `.<name>.<random>.unfinished`, never `target`.

    Raises:
        DataError: `target` exists, or the disk refuses.
    """
    refuse_existing(target)
    try:
        unfinished = _unfinished_sibling(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        yield unfinished
        sync_all([*unfinished.rglob("*"), unfinished])
        refuse_existing(target)
        unfinished.rename(target)
        sync(target.absolute().parent)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(target, error) from error
        raise


def _unfinished_sibling(target: Path) -> Path:
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=parent))
    folder.chmod(0o755)
    return folder


def cannot_write(target: Path, error: OSError) -> DataError:
    """Return the error for a disk that refuses."""
    return DataError(f"{target}: expected to write it, got: {error.strerror or error}. Check the folder and its space.")


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file with zstd; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def write_part(histories: pa.Table, path: Path, *, compact: bool = True) -> None:
    """Write a part, users by index; one that `ksa compact` will write again need not be small."""
    options: dict[str, Any] = PART_OPTIONS if compact else PART_OPTIONS | {"compression": "none"}
    with pq.ParquetWriter(str(path), histories.schema, **options) as writer:
        for group in row_groups(histories):
            writer.write_table(group, row_group_size=group.num_rows)
    begin_sync(path)


def row_groups(histories: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows in tables of about `ROW_GROUP_EVENTS` events."""
    offsets = histories.column("item_index").combine_chunks().offsets.to_numpy()
    ends = offsets[1:] - offsets[0]
    cuts = np.searchsorted(ends, np.arange(ROW_GROUP_EVENTS, ends[-1], ROW_GROUP_EVENTS)) + 1
    cuts = np.unique(np.concatenate([[0], cuts, [histories.num_rows]]))
    for first, last in zip(cuts.tolist(), cuts[1:].tolist()):
        yield histories.slice(first, last - first)


def hash_files(directory: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of files of a data set by name."""
    return {path.relative_to(directory).as_posix(): file_hash(path) for path in sorted(paths)}


def sync_all(paths: Iterable[Path]) -> None:
    """Have the disk hold files and folders; many at a time, because this is waiting."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync, paths))


def begin_sync(path: Path) -> None:
    """Have the disk begin to take a file, without waiting: the sync at the end finds less to do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # pages that are not on disk yet are kept
    finally:
        os.close(descriptor)
