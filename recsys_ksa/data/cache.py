"""The loader's copy of the histories: one uncompressed Arrow IPC record batch, users by index, hash-checked.

    cache/histories.arrow   what training and evaluation map into memory
    cache/histories.json    sha256 of that file, and the content and split hash it was built from

The cache can always be rebuilt from histories/part-*.parquet: the newest part's row of a user counts.
"""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ksa.data.manifest import Manifest, check_file, content_hash, file_hash
from recsys_ksa.errors import DataError
from recsys_ksa.schema import SPLIT_COLUMNS

CACHE = "cache/histories.arrow"
CACHE_SEAL = "cache/histories.json"
_log = logging.getLogger(__name__)


def cached_columns(histories: pa.Table) -> pa.Table:
    """Return what the loader needs of a histories table: users by index, one chunk, without ties and event ids."""
    names = ["user_id", "user_index", "item_index", "timestamp", "event_type", *SPLIT_COLUMNS]
    kept = histories.select([name for name in names if name in histories.column_names])
    return kept.sort_by("user_index").combine_chunks()


def write_cache(directory: Path, histories: pa.Table, content: str, split: str) -> None:
    """Write the cache and its seal into the data set `directory`; a reader sees the old one or the new one whole."""
    folder = Path(directory) / "cache"
    folder.mkdir(exist_ok=True)
    table = cached_columns(histories)
    unfinished = folder / f".histories.arrow.{os.getpid()}"
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        # One batch, so that each column is one run of values on disk.
        writer.write_table(table, max_chunksize=max(table.num_rows, 1))
    seal = {"sha256": file_hash(unfinished), "content_hash": content, "split_hash": split}
    unfinished_seal = folder / f".histories.json.{os.getpid()}"
    unfinished_seal.write_text(json.dumps(seal, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(Path(directory) / CACHE)
    unfinished_seal.replace(Path(directory) / CACHE_SEAL)


def map_cache(directory: Path, manifest: Manifest) -> pa.RecordBatch:
    """Return the cached histories as one memory-mapped record batch; rebuild the cache where it is missing or old.

    Raises:
        DataError: the cache was altered, or a part that a rebuild needs is missing or altered.
    """
    directory = Path(directory)
    seal = _read_seal(directory)
    if seal is None or (seal["content_hash"], seal["split_hash"]) != (manifest.content_hash, manifest.split_hash):
        _log.warning("%s: building %s from the parts", directory, CACHE)
        _rebuild(directory, manifest)
        seal = _read_seal(directory)
        assert seal is not None
    path = directory / CACHE
    found = file_hash(path)
    if found != seal["sha256"]:
        raise DataError(
            f"{path}: expected sha256 {seal['sha256'][:12]}..., got {found[:12]}...: the cache was altered. "
            f"Delete {directory / 'cache'}; it is rebuilt at the next use."
        )
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return reader.get_batch(0)


def read_parts(directory: Path, manifest: Manifest) -> pa.Table:
    """Return the histories of the parts, users by index; of a user in several parts the newest row.

    Raises:
        DataError: a part is missing or altered, or all together are not what the manifest says.
    """
    names = sorted(name for name in manifest.files if name.startswith("histories/"))
    if not names:
        raise DataError(f"{directory}: expected histories/part-*.parquet in the manifest, got none. Prepare it again.")
    table = _newest_rows(pa.concat_tables([pq.read_table(check_file(directory, manifest, name)) for name in names]))
    found = content_hash(table)
    if found != manifest.content_hash:
        raise DataError(
            f"{directory}: expected content_hash {manifest.content_hash[:12]}..., its parts give {found[:12]}.... "
            "Prepare the data set again."
        )
    return table


def _newest_rows(table: pa.Table) -> pa.Table:
    """Of each user the last row, users by index: parts are read in order of log, and a later log's row is whole."""
    backwards = table.column("user_index").to_numpy()[::-1]
    _, newest = np.unique(backwards, return_index=True)
    return table.take(pa.array(len(backwards) - 1 - newest))


def _rebuild(directory: Path, manifest: Manifest) -> None:
    histories = read_parts(directory, manifest)
    try:
        write_cache(directory, histories, manifest.content_hash, manifest.split_hash)
    except OSError as error:
        raise DataError(
            f"{directory / 'cache'}: expected to write the cache, got: {error.strerror}. Make the folder writable once."
        ) from error


def _read_seal(directory: Path) -> dict[str, str] | None:
    if not (directory / CACHE).is_file():
        return None
    try:
        seal = json.loads((directory / CACHE_SEAL).read_text(encoding="utf-8"))
        return {name: str(seal[name]) for name in ("sha256", "content_hash", "split_hash")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
