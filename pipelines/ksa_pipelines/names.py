"""The item ids and event types of a whole log, numbered by their bytes; each chunk's own numbers are put into these.

Between the first pass and the second: rows hold numbers, so that names are compared once a chunk and not once a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ksa_pipelines.arrow import read_column, to_arrow, write_table
from ksa_pipelines.spill import Chunk
from recsys_ksa.data.ahead import map_ahead

GROUP = 1 << 20
"""Names of chunks that are worked on together, at least."""


@dataclass(frozen=True)
class Names:
    """Different names of a log; a name's code is its row."""

    path: Path
    """Table of `name`, by bytes."""
    codes: Path
    """int32: chunk after chunk, the code of each of its names, then -1."""
    starts: tuple[int, ...]
    """Where in that file each chunk begins; then where it ends."""
    count: int

    @cached_property
    def values(self) -> pl.Series:
        """The names by code."""
        return pl.Series("name", read_column(self.path, "name"), dtype=pl.String)

    def of_chunks(self) -> list[NDArray[np.int32]]:
        """Return for each chunk the codes of its names, and -1 at the end: what the number -1 (no name) is."""
        codes = np.asarray(np.memmap(self.codes, dtype=np.int32, mode="r"))
        return [codes[first:last] for first, last in pairwise(self.starts)]


def number_names(chunks: Sequence[Chunk], column: str, folder: Path) -> Names:
    """Number the names of all chunks, and write them and each chunk's codes into `folder`.

    Args:
        chunks: of the log.
        column: `item` or `event_type`.
        folder: to write into.
    """
    names = to_arrow(_different(chunks, column))
    path, codes = folder / f"{column}.names.arrow", folder / f"{column}.codes"
    write_table(pa.table({"name": names}), path)
    options = pc.SetLookupOptions(names)

    def codes_of(group: Sequence[Chunk]) -> list[NDArray[np.int32]]:
        found = pc.call_function("index_in", [_names(group, column)], options).to_numpy().astype(np.int32, copy=False)
        return np.split(found, np.cumsum([chunk.num_names[column] for chunk in group])[:-1])

    with codes.open("wb") as file:
        for group in map_ahead(codes_of, _groups(chunks, column, max(GROUP, 2 * len(names)))):
            for chunk in group:
                np.append(chunk, np.int32(-1)).tofile(file)
    starts = np.append(0, np.cumsum([chunk.num_names[column] + 1 for chunk in chunks]))
    return Names(path, codes, tuple(starts.tolist()), len(names))


def _different(chunks: Sequence[Chunk], column: str) -> pl.Series:
    """Return the different names of all chunks by their bytes, in bounded memory."""

    def of_group(group: Sequence[Chunk]) -> pl.Series:
        return pl.Series("name", _names(group, column), dtype=pl.String).unique()

    different = pl.Series("name", [], dtype=pl.String)
    for more in map_ahead(of_group, _groups(chunks, column, GROUP)):
        different = pl.concat([different, more]).unique()
    return different.sort()  # strings compare as their bytes


def _groups(chunks: Sequence[Chunk], column: str, size: int) -> Iterator[list[Chunk]]:
    """Yield chunk after chunk, as many at a time as have about `size` names."""
    pending, height = list[Chunk](), 0
    for chunk in chunks:
        pending.append(chunk)
        height += chunk.num_names[column]
        if height >= size:
            yield pending
            pending, height = [], 0
    if pending:
        yield pending


def _names(chunks: Sequence[Chunk], column: str) -> pa.ChunkedArray:
    return pa.chunked_array([read_column(chunk.path(column), "name") for chunk in chunks])


def audit_ranks(names: pl.Series) -> NDArray[np.int64]:
    """Return each name's place in the order the tie audit compares by: as integers where all are, else by bytes.

    Integers that are equal (010 and 10) have one place.
    """
    numbers = names.cast(pl.Int64, strict=False)
    if len(names) == 0 or numbers.null_count():
        return np.arange(len(names))
    return numbers.rank("dense").cast(pl.Int64).to_numpy()
