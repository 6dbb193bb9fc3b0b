"""Between Polars and Arrow: the types that every Arrow reader knows (no string views), codes for strings."""

from io import FileIO
from pathlib import Path
from typing import overload

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@overload
def to_arrow(values: pl.DataFrame) -> pa.Table: ...
@overload
def to_arrow(values: pl.Series) -> pa.Array: ...
def to_arrow(values: pl.DataFrame | pl.Series) -> pa.Table | pa.Array:
    """Return a frame as a table, a series as an array; strings as large_string."""
    return values.to_arrow(compat_level=pl.CompatLevel.oldest())


def encode(values: pl.Series) -> tuple[NDArray[np.int32], pl.Series]:
    """Return each value's code and the distinct values in order of first sight; nulls get code -1."""
    if values.dtype == pl.String and values.null_count() == 0:
        # Hashes compare faster than texts; two texts of one hash are found by comparing once at the end.
        codes = to_arrow(values.hash()).dictionary_encode().indices.to_numpy()
        first = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))  # codes count by first sight
        distinct = values.gather(first)
        if (distinct.gather(codes) == values).all():
            return codes, distinct
    found = to_arrow(values).dictionary_encode()
    indices = found.indices.fill_null(-1) if found.null_count else found.indices
    return indices.to_numpy(), pl.Series(values.name, found.dictionary, dtype=values.dtype)


def find_texts(texts: pa.Array | pa.ChunkedArray, among: pl.Series) -> NDArray[np.int64]:
    """Return where each text is among others without nulls, -1 where it is not. Best with the fewer ones as `among`."""
    options = pc.SetLookupOptions(to_arrow(among).cast(texts.type))
    return pc.call_function("index_in", [texts], options).fill_null(-1).to_numpy().astype(np.int64)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as an Arrow IPC file of one record batch (none for no rows)."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def write_texts(texts: pa.LargeStringArray, path: Path) -> None:
    """Write texts without nulls: where each ends (int64, from 0), then their bytes."""
    _, ends, values = texts.buffers()
    ends = np.frombuffer(ends, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    with path.open("wb") as file:
        (ends - ends[0]).tofile(file)
        file.write(memoryview(b"" if values is None else values)[ends[0] : ends[-1]])


def read_texts(path: Path, total: int, first: int, last: int) -> pa.LargeStringArray:
    """Return texts `first` to `last`, without, of the `total` that `write_texts` wrote; an Arrow file opens slower."""
    ends = np.empty(last - first + 1, dtype=np.int64)
    with path.open("rb", buffering=0) as file:
        read_into(file, 8 * first, ends)
        values = np.empty(ends[-1] - ends[0], dtype=np.uint8)
        read_into(file, 8 * (total + 1) + int(ends[0]), values)
    return pa.LargeStringArray.from_buffers(last - first, pa.py_buffer(ends - ends[0]), pa.py_buffer(values))


def read_into(file: FileIO, at: int, values: NDArray) -> None:
    """Read what lies at a place of a file into an array, whole."""
    file.seek(at)
    left = values.view(np.uint8).data
    while left:
        count = file.readinto(left)
        assert count, "the file is shorter than what was written"
        left = left[count:]


def read_column(path: Path, name: str, first: int = 0, count: int | None = None) -> pa.Array:
    """Return `count` values from `first` on of a column that `write_table` wrote as one record batch, copied."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        if not reader.num_record_batches:
            return pa.array([], reader.schema.field(name).type)
        return pa.concat_arrays([reader.get_batch(0).column(name).slice(first, count)])


def read_table(path: Path) -> pa.Table:
    """Return the table that `write_table` wrote, copied into memory: the file may be written again."""
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def take_rows(frame: pl.DataFrame, rows: NDArray[np.int64]) -> pl.DataFrame:
    """Return some rows of a frame without nulls in its numbers; strings may have them."""
    return pl.DataFrame(
        [
            column.gather(rows) if column.dtype == pl.String else pl.Series(column.name, column.to_numpy().take(rows))
            for column in frame
        ]
    )


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Write a frame as an Arrow IPC file."""
    write_table(to_arrow(frame), path)


def read_frame(path: Path) -> pl.DataFrame:
    """Return the frame that `write_frame` wrote; see `read_table`."""
    return pl.DataFrame(read_table(path))
