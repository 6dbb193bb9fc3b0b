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


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Write a frame as an Arrow IPC file."""
    table = to_arrow(frame)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_frame(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """Return the frame that `write_frame` wrote, copied into memory: the file may be written again."""
    options = None
    if columns is not None:
        with pa.OSFile(str(path)) as source:
            names = pa.ipc.open_file(source).schema.names
        options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
    with pa.OSFile(str(path)) as source:
        return pl.DataFrame(pa.ipc.open_file(source, options=options).read_all())
