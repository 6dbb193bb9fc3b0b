"""First pass: each file of a log is mapped, checked and spilled to disk as numbers, sorted by the bucket of its users.

A chunk of rows writes each user, item and event type once; its rows hold their places. `names.py` makes these places
the same for all chunks, `read_rows` reads neighbouring buckets of them without touching the others:

    <stem>.rows          column after column of numbers: user (place in the chunk's users), row, item, timestamp and,
                         where the log has them, event types and values; sorted by bucket
    <stem>.texts.arrow   what is text in each row, in the same order: event_id, where the log has it
    <stem>.users         the chunk's different user ids (`arrow.write_texts`), sorted by bucket
    <stem>.item.arrow, <stem>.event_type.arrow   the names that item and event_type count
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from ksa_pipelines.arrow import encode, read_column, read_into, read_texts, to_arrow, write_table, write_texts
from ksa_pipelines.checks import FORGOTTEN, REASON, mark_rejected, refuse_milliseconds
from ksa_pipelines.columns import column_kinds, map_columns
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.quarantine import Quarantine
from ksa_pipelines.report import tally
from ksa_pipelines.sources import ROW, File, Format, reading, scan
from ksa_pipelines.vocab import user_buckets
from recsys_ksa.data.manifest import Forgotten
from recsys_ksa.errors import DataError, SchemaError

NAMED = {"item_id": "item", "event_type": "event_type"}
"""Columns of names, and what their numbers are called."""


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
class Chunk:
    """Spilled rows of one file."""

    stem: str
    """Path of its files, without their endings."""
    row_ends: NDArray[np.int64]
    """[num_buckets + 1] bucket b's rows are row_ends[b] : row_ends[b + 1]."""
    user_ends: NDArray[np.int64]
    """[num_buckets + 1] the same of its users."""
    num_names: dict[str, int]
    """Different names in it, by number column."""
    numbers: dict[str, np.dtype]
    """Columns of numbers, as they follow one another in the file."""
    texts: tuple[str, ...]
    """Columns of text."""
    first_arrival: int = 0
    """Arrival number of its file's first row."""

    def path(self, name: str) -> Path:
        """Return the Arrow file of `texts`, `item` or `event_type`."""
        return Path(f"{self.stem}.{name}.arrow")

    def num_rows(self, buckets: range) -> int:
        """Return how many rows neighbouring buckets have."""
        return int(self.row_ends[buckets.stop] - self.row_ends[buckets.start])

    def read_numbers(self, buckets: range, columns: Mapping[str, NDArray]) -> None:
        """Read the numbers of neighbouring buckets into arrays of as many rows, by name."""
        first, begin = int(self.row_ends[buckets.start]), 0
        with open(f"{self.stem}.rows", "rb", buffering=0) as file:
            for name, kind in self.numbers.items():
                read_into(file, begin + first * kind.itemsize, columns[name])
                begin += int(self.row_ends[-1]) * kind.itemsize

    def text(self, name: str, buckets: range) -> pa.Array:
        """Return the rows of neighbouring buckets of a column of text."""
        return read_column(self.path("texts"), name, int(self.row_ends[buckets.start]), self.num_rows(buckets))

    def users(self, buckets: range) -> pa.Array:
        """Return the users of neighbouring buckets, in the order that rows count."""
        first, last = self.user_ends[[buckets.start, buckets.stop]].tolist()
        return read_texts(Path(f"{self.stem}.users"), int(self.user_ends[-1]), first, last)


@dataclass(frozen=True)
class Spilled:
    """A spilled file."""

    num_rows: int
    rejected: dict[str, int]
    columns: dict[str, str]
    """The mapped columns that the file has, and of what kind they are there."""
    chunks: tuple[Chunk, ...]
    bucket_rows: NDArray[np.int64] = field(repr=False)
    """Rows of each bucket, [num_buckets]."""


def spill(task: SpillTask) -> Spilled:
    """Spill one file; rows keep their number in it.

    Raises:
        SchemaError: a column is missing, of a wrong type, or the times cannot be Unix seconds.
        DataError: the file is broken.
    """
    config, rejected, chunks, num_rows = task.config, Counter[str](), list[Chunk](), 0
    columns = dict[str, str]()
    with Quarantine(task.folder / f"rejected-{task.number:06d}.parquet") as quarantine:
        for batch in _read(task, columns):
            num_rows += batch.height
            refuse_milliseconds(batch, config, task.log)
            bad = batch.filter(pl.col(REASON).is_not_null())
            if bad.height:
                rejected.update(tally(bad[REASON]))
                quarantine.write(bad.filter(pl.col(REASON) != FORGOTTEN), task.number)
                batch = batch.filter(pl.col(REASON).is_null())
            if batch.height:
                stem = task.folder / f"chunk-{task.number:06d}-{len(chunks):06d}"
                chunks.append(write_chunk(batch.drop(REASON), config.num_buckets, stem))
    bucket_rows = sum((np.diff(chunk.row_ends) for chunk in chunks), np.zeros(config.num_buckets, dtype=np.int64))
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


def write_chunk(rows: pl.DataFrame, num_buckets: int, stem: Path) -> Chunk:
    """Write mapped rows as the chunk `stem`, those of a bucket in their order."""
    user, users = encode(rows["user_id"])
    bucket = user_buckets(users, num_buckets)
    by_bucket = np.argsort(bucket, kind="stable")
    user_ends = _ends(bucket, num_buckets)
    place = np.empty(len(users), dtype=np.int32)
    place[by_bucket] = np.arange(len(users))
    bucket = bucket[user]
    order = np.argsort(bucket, kind="stable")

    numbers: dict[str, NDArray] = {"user": place[user]}
    texts: dict[str, pa.Array] = {}
    num_names: dict[str, int] = {}
    for name in rows.columns:
        if name in NAMED:
            codes, names = encode(rows[name])
            numbers[NAMED[name]] = codes
            num_names[NAMED[name]] = len(names)
            write_table(pa.table({"name": to_arrow(names)}), Path(f"{stem}.{NAMED[name]}.arrow"))
        elif rows[name].dtype != pl.String:
            numbers[name] = rows[name].to_numpy()
        elif name != "user_id":
            texts[name] = to_arrow(rows[name]).take(pa.array(order))
    with open(f"{stem}.rows", "wb", buffering=0) as file:
        for values in numbers.values():
            values.take(order).tofile(file)
    kinds = {name: values.dtype for name, values in numbers.items()}
    if texts:
        write_table(pa.table(texts), Path(f"{stem}.texts.arrow"))
    write_texts(to_arrow(users).take(pa.array(by_bucket)), Path(f"{stem}.users"))
    return Chunk(str(stem), _ends(bucket, num_buckets), user_ends, num_names, kinds, tuple(texts))


def _ends(bucket: NDArray[np.uint16], num_buckets: int) -> NDArray[np.int64]:
    return np.append(0, np.cumsum(np.bincount(bucket, minlength=num_buckets)))


def read_users(chunks: Sequence[Chunk], buckets: range) -> tuple[pl.DataFrame, list[NDArray[np.int32]]]:
    """Return the different users of neighbouring buckets, and for each chunk the row there of each of its users.

    Args:
        chunks: of the log; those without such users are asked as well.
        buckets: neighbours.

    Returns:
        user_id and bucket (int64), in no order; and the rows, chunk by chunk.
    """
    users = [chunk.users(buckets) for chunk in chunks]
    row, different = encode(pl.Series("user_id", pa.chunked_array(users, pa.large_string()), dtype=pl.String))
    bucket = np.empty(len(different), dtype=np.int64)
    ends = [chunk.user_ends[buckets.start : buckets.stop + 1] for chunk in chunks]
    bucket[row] = np.concatenate([np.repeat(np.asarray(buckets), np.diff(each)) for each in ends])
    rows = np.split(row, np.cumsum([len(each) for each in users])[:-1])
    return pl.DataFrame({"user_id": different, "bucket": bucket}), rows


def read_rows(
    chunks: Sequence[Chunk],
    codes: Mapping[str, Sequence[NDArray[np.int32]]],
    user_rows: Sequence[NDArray[np.int32]],
    buckets: range,
) -> pl.DataFrame:
    """Return the rows of neighbouring buckets, of which there is one at least; each bucket's in the order of the log.

    Args:
        chunks: of the log.
        codes: by number column, for each chunk what its numbers are in the whole log, -1 (none) last.
        user_rows: of `read_users`.
        buckets: the same.

    Returns:
        user (row of the users), item, timestamp, arrival and, where the log has them, event_type and event_id.
    """
    there = [number for number, chunk in enumerate(chunks) if chunk.num_rows(buckets)]
    heights = [chunks[number].num_rows(buckets) for number in there]
    kinds, texts = chunks[0].numbers, chunks[0].texts
    columns = {name: np.empty(sum(heights), dtype=kind) for name, kind in kinds.items()}
    first = 0
    for number, height in zip(there, heights):
        chunk = chunks[number]
        piece = {name: values[first : first + height] for name, values in columns.items()}
        chunk.read_numbers(buckets, piece)
        for name in codes:
            piece[name][:] = codes[name][number].take(piece[name])
        piece["user"][:] = user_rows[number].take(piece["user"] - np.int32(chunk.user_ends[buckets.start]))
        piece[ROW] += np.uint64(chunk.first_arrival)
        first += height
    columns["arrival"] = columns.pop(ROW)
    found = {name: pa.concat_arrays([chunks[number].text(name, buckets) for number in there]) for name in texts}
    return pl.DataFrame(columns | {name: pl.Series(text, dtype=pl.String) for name, text in found.items()})


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
