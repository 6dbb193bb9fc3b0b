"""First pass: each file of a log is mapped, checked and spilled to disk, sorted by the bucket of its users.

A chunk is an Arrow IPC file with one record batch a bucket, so that a bucket is read without touching the others.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.checks import FORGOTTEN, REASON, mark_rejected, refuse_milliseconds
from ksa_pipelines.columns import column_kinds, map_columns
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.quarantine import Quarantine
from ksa_pipelines.report import tally
from ksa_pipelines.sources import ROW, File, Format, reading, scan
from ksa_pipelines.vocab import user_bucket
from recsys_ksa.data.manifest import Forgotten
from recsys_ksa.errors import DataError, SchemaError


@dataclass(frozen=True)
class SpillTask:
    """One file of a log to spill."""

    file: File
    format: Format
    number: int
    """Of the file in the log, from 0."""
    log: str
    """What the user called the log; for messages."""
    config: PrepareConfig
    forgotten: Forgotten | None
    chunk_rows: int
    """Rows held at a time."""
    folder: Path
    """Where chunks and rejected rows go."""


@dataclass(frozen=True)
class Spilled:
    """A spilled file."""

    num_rows: int
    rejected: dict[str, int]
    columns: dict[str, str]
    """The mapped columns that the file has, and of what kind they are there."""
    chunks: tuple[Path, ...]
    bucket_rows: NDArray[np.int64]
    """Rows of each bucket, [num_buckets]."""


def spill(task: SpillTask) -> Spilled:
    """Spill one file; rows keep their number in it.

    Raises:
        SchemaError: a column is missing, of a wrong type, or the times cannot be Unix seconds.
        DataError: the file is broken.
    """
    config, rejected, chunks, num_rows = task.config, Counter[str](), list[Path](), 0
    bucket_rows = np.zeros(config.num_buckets, dtype=np.int64)
    columns = dict[str, str]()
    with Quarantine(task.folder / f"rejected-{task.number:06d}.parquet") as quarantine:
        for batch in _read(task, columns):
            num_rows += batch.height
            refuse_milliseconds(batch.lazy(), config, task.log)
            bad = batch.filter(pl.col(REASON).is_not_null())
            if bad.height:
                rejected.update(tally(bad[REASON]))
                quarantine.write(bad.filter(pl.col(REASON) != FORGOTTEN), task.number)
                batch = batch.filter(pl.col(REASON).is_null())
            if batch.height:
                path = task.folder / f"chunk-{task.number:06d}-{len(chunks):06d}.arrow"
                bucket_rows += write_chunk(batch.drop(REASON), config.num_buckets, path)
                chunks.append(path)
    return Spilled(num_rows, dict(rejected), columns, tuple(chunks), bucket_rows)


def _read(task: SpillTask, columns: dict[str, str]) -> Iterator[pl.DataFrame]:
    """Yield the file's mapped and marked rows; fill in the kinds of its columns."""
    config = task.config
    with reading(task.log):  # what goes wrong while chunks are written is not the file's fault, and not caught here
        raw = scan(task.format, task.file, config.read)
        schema = dict(raw.collect_schema())
        columns |= column_kinds(config.columns, schema)
        mapped = raw.pipe(map_columns, config.columns, schema, task.log, config.read)
        rows = mapped.pipe(mark_rejected, config, task.forgotten)
        met = 0
        for batch in rows.collect_batches(chunk_size=task.chunk_rows, maintain_order=True, engine="streaming"):
            met += batch.height
            yield batch
        _refuse_lost_rows(task, met)


def _refuse_lost_rows(task: SpillTask, met: int) -> None:
    """Refuse a file whose footer names more rows than came: pages that are damaged can end the reading unsaid."""
    if task.format in ("csv", "ndjson"):
        return
    named = scan(task.format, task.file, task.config.read).select(pl.len()).collect().item()
    if named != met:
        raise DataError(
            f"{task.log}: cannot be read: {Path(task.file).name}: expected the {named:,} rows that it names, got "
            f"{met:,}. Mend or replace the file."
        )


def write_chunk(rows: pl.DataFrame, num_buckets: int, path: Path) -> NDArray[np.int64]:
    """Write rows sorted by bucket, one record batch a bucket, in their order; return the rows of each."""
    bucket = buckets_of(rows["user_id"], num_buckets)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(num_buckets + 1))
    table = to_arrow(rows[order])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for first, last in zip(ends.tolist(), ends[1:].tolist()):
            for batch in table.slice(first, last - first).combine_chunks().to_batches() or _empty(table.schema):
                writer.write_batch(batch)
    return np.diff(ends)


def buckets_of(user_ids: pl.Series, num_buckets: int) -> NDArray[np.int16]:
    """Return the bucket of each user id, int16 [rows]; each different id is hashed once."""
    codes = to_arrow(user_ids).dictionary_encode()
    known = np.array([user_bucket(user, num_buckets) for user in codes.dictionary.to_pylist()], dtype=np.int16)
    return known[codes.indices.to_numpy()]


def read_bucket(chunks: Sequence[tuple[Path, int]], bucket: int) -> pl.DataFrame:
    """Return a bucket's rows, in the order of the log, with the column `arrival` in place of `ROW`.

    Args:
        chunks: each with the arrival number of its file's first row.
        bucket: the bucket.
    """
    tables, arrivals = [], []
    for path, first_arrival in chunks:
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(bucket)
            if batch.num_rows:
                arrivals.append(batch.column(ROW).to_numpy() + np.uint64(first_arrival))
                tables.append(pa.Table.from_batches([batch]).drop_columns(ROW))
    if not tables:
        return pl.DataFrame()
    rows = pl.DataFrame(pa.concat_tables(tables))
    return rows.with_columns(arrival=pl.Series(np.concatenate(arrivals)))


def refuse_mixed_columns(spilled: Sequence[Spilled], names: Sequence[str], log: str) -> None:
    """Refuse a log whose files have different mapped columns.

    Raises:
        SchemaError: naming the file, the columns it has and those of the first file.
    """
    first = spilled[0].columns
    for file, name in zip(spilled, names):
        unlike = [each for each in first if "null" not in (first[each], file.columns.get(each, first[each]))]
        if set(first) != set(file.columns) or any(first[each] != file.columns[each] for each in unlike):
            raise SchemaError(
                f"{log}: expected the same columns and types in every file: {name} has {_listed(file.columns)}, "
                f"{names[0]} has {_listed(first)}. Mend the file, or prepare the two kinds as two logs."
            )


def _listed(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def _empty(schema: pa.Schema) -> list[pa.RecordBatch]:
    return pa.Table.from_batches([], schema).to_batches() or [pa.RecordBatch.from_pylist([], schema=schema)]
