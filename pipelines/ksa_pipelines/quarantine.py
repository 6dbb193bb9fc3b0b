"""The rows of a log that are no events, kept with the reason so that they can be looked at and sent again."""

from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.sources import ROW

MAX_TEXT = 256
"""Characters of a text that are kept."""


def quarantine_name(log: int) -> str:
    """Return where a log's rejected rows lie in the data set."""
    return f"quarantine/log-{log:05d}.parquet"


class Quarantine:
    """A Parquet file of rejected rows, written as they are met; there only if there are any."""

    def __init__(self, path: Path) -> None:
        self._path, self._writer = path, None

    def __enter__(self) -> Self:
        return self

    def write(self, rows: pl.DataFrame, file: int) -> None:
        """Add rows with their `reason`; texts are cut to `MAX_TEXT` characters.

        Args:
            rows: mapped rows with `ROW` and the reason.
            file: number of the file in the log.
        """
        if rows.is_empty():
            return
        texts = [pl.col(name).str.slice(0, MAX_TEXT) for name in rows.columns if rows[name].dtype == pl.String]
        table = to_arrow(
            rows.with_columns(texts).select(pl.lit(file).alias("file"), pl.col(ROW).alias("row"), pl.exclude(ROW))
        )
        if self._writer is None:
            self._writer = pq.ParquetWriter(str(self._path), table.schema, compression="zstd")
        self._writer.write_table(table)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()


def gather_quarantine(folder: Path, target: Path) -> None:
    """Join the rejected rows of a log's files into one Parquet file; nothing where there are none."""
    files = sorted(folder.glob("rejected-*.parquet"))
    if files:
        target.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(str(target), pq.read_schema(files[0]), compression="zstd") as writer:
            for file in files:
                for batch in pq.ParquetFile(file).iter_batches():
                    writer.write_table(pa.Table.from_batches([batch]))
