"""Writing a data set so that it is there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ksa.errors import DataError


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
        raise _cannot_write(target, error) from error
    try:
        yield unfinished
        for folder, _, names in os.walk(unfinished):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        refuse_existing(target)
        unfinished.rename(target)
        _sync(target.absolute().parent)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(target, error) from error
        raise


def _unfinished_sibling(target: Path) -> Path:
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=parent))
    folder.chmod(0o755)
    return folder


def _cannot_write(target: Path, error: OSError) -> DataError:
    return DataError(f"{target}: expected to write it, got: {error.strerror or error}. Check the folder and its space.")


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file with zstd; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def write_parts(histories: pa.Table, directory: Path, num_buckets: int, log_number: int) -> None:
    """Write histories/part-<log>-<bucket>.parquet for each bucket that has users; a later log's parts sort after."""
    bucket = histories.column("user_index").to_numpy() % num_buckets
    order = np.argsort(bucket, kind="stable")
    found, starts = np.unique(bucket[order], return_index=True)
    for number, rows in zip(found, np.split(order, starts[1:])):
        name = f"part-{log_number:05d}-{number:05d}.parquet"
        write_table(histories.take(pa.array(rows)), directory / "histories" / name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
