"""Between Polars and Arrow: the types that every Arrow reader knows (no string views), codes for strings."""

from pathlib import Path
from typing import overload

import numpy as np
import polars as pl
import pyarrow as pa
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
    codes = to_arrow(values).dictionary_encode()
    return codes.indices.fill_null(-1).to_numpy(), pl.Series(values.name, codes.dictionary, dtype=values.dtype)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as an Arrow IPC file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Return the table that `write_table` wrote, copied into memory: the file may be written again."""
    with pa.OSFile(str(path)) as source:
        names = pa.ipc.open_file(source).schema.names
    wanted = [names.index(name) for name in columns or names]
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted)).read_all()


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Write a frame as an Arrow IPC file."""
    write_table(to_arrow(frame), path)


def read_frame(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """Return the frame that `write_frame` wrote; see `read_table`."""
    return pl.DataFrame(read_table(path, columns))
