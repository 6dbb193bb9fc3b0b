"""The item ids and event types of a whole log, numbered by their bytes; each chunk's own numbers are put into these.

Beside the first pass, chunk after chunk as they come: rows hold numbers, so that names are compared once a chunk and
not once a row.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from ksa_pipelines.arrow import encode, read_column, to_arrow, write_table
from ksa_pipelines.spill import Chunk

GROUP = 1 << 18
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


class NameCollector:
    """Numbers the names of chunks that come one after the other, in memory for the different ones.

    Args:
        column: `item` or `event_type`.
        folder: to write into.
    """

    def __init__(self, column: str, folder: Path) -> None:
        self._column = column
        self._path, self._codes = folder / f"{column}.names.arrow", folder / f"{column}.codes"
        self._codes.write_bytes(b"")
        self._different = pl.Series("name", [], dtype=pl.String)
        """In order of first sight; the file counts these."""
        self._waiting: list[Chunk] = []
        self._starts = [0]

    def add(self, chunk: Chunk) -> None:
        """Take the names of the next chunk."""
        self._waiting.append(chunk)
        waiting = sum(chunk.num_names[self._column] for chunk in self._waiting)
        if waiting >= max(GROUP, 2 * len(self._different)):
            self._number_waiting()

    def names(self) -> Names:
        """Return the names of all chunks, numbered by their bytes."""
        if self._waiting:
            self._number_waiting()
        order = self._different.arg_sort().to_numpy()  # strings compare as their bytes
        code = np.full(len(order) + 1, -1, dtype=np.int32)
        code[order] = np.arange(len(order))
        codes = np.memmap(self._codes, dtype=np.int32, mode="r+")
        for first, last in pairwise(self._starts):
            codes[first:last] = code.take(codes[first:last])
        write_table(pa.table({"name": to_arrow(self._different.gather(order))}), self._path)
        return Names(self._path, self._codes, tuple(self._starts), len(order))

    def _number_waiting(self) -> None:
        names = [read_column(chunk.path(self._column), "name") for chunk in self._waiting]
        known = len(self._different)
        # What is known comes first, so that it keeps its numbers.
        together = pa.chunked_array([to_arrow(self._different), *names])
        codes, self._different = encode(pl.Series("name", together, dtype=pl.String))
        ends = np.cumsum([known, *map(len, names)])
        with self._codes.open("ab") as file:
            for first, last in pairwise(ends.tolist()):
                np.append(codes[first:last], np.int32(-1)).tofile(file)
                self._starts.append(self._starts[-1] + last - first + 1)
        self._waiting = []


def audit_ranks(names: pl.Series) -> NDArray[np.int64]:
    """Return each name's place in the order the tie audit compares by: as integers where all are, else by bytes.

    Integers that are equal (010 and 10) have one place.
    """
    numbers = names.cast(pl.Int64, strict=False)
    if len(names) == 0 or numbers.null_count():
        return np.arange(len(names))
    return numbers.rank("dense").cast(pl.Int64).to_numpy()
