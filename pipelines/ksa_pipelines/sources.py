"""Reading logs: a Parquet or CSV file, a folder of them, or a pattern, as one lazy frame with a row number."""

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import polars as pl

from recsys_ksa.data.hashes import file_hash
from recsys_ksa.data.manifest import SourceFile
from recsys_ksa.errors import DataError, SchemaError

Format = Literal["parquet", "csv"]
File = Path | str
"""A file, or the address of one that Polars reads by itself."""
ROW = "__row"
"""Column of the row number in its file, from 0."""
_SUFFIXES: dict[Format, tuple[str, ...]] = {"parquet": (".parquet", ".pq"), "csv": (".csv", ".csv.gz")}


def find_files(log: str) -> tuple[Format, list[Path]]:
    """Return the format and the files of a log, in order of name.

    Args:
        log: a file, a folder (its *.parquet, or its *.csv and *.csv.gz), or a pattern with `*`.

    Raises:
        DataError: there is nothing, a format that is not read, or both formats.
    """
    path = Path(log)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_part(file))
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(log) if Path(name).is_file())
    if not files:
        raise DataError(
            f"{log}: expected a file, a folder of Parquet or CSV files, or a pattern; found none. Check it."
        )
    formats: set[Format | None] = {_format(file) for file in files}
    found = formats.pop()
    if found is None or formats:
        raise DataError(
            f"{log}: expected Parquet (.parquet) or CSV (.csv, .csv.gz) files of one format, "
            f"got {', '.join(file.name for file in files[:5])}. Rename or convert them."
        )
    return found, files


def scan(files_format: Format, file: File) -> pl.LazyFrame:
    """Return a file as a lazy frame, with `ROW`. CSV columns are all strings: ids keep their leading zeros."""
    if files_format == "parquet":
        return pl.scan_parquet(file, row_index_name=ROW, hive_partitioning=False)
    return pl.scan_csv(file, row_index_name=ROW, infer_schema=False)


def scan_all(files_format: Format, files: Sequence[File]) -> pl.LazyFrame:
    """Return all files as one lazy frame; they must have the same columns."""
    return pl.concat([scan(files_format, file) for file in files])


def source_files(files: Sequence[File]) -> tuple[SourceFile, ...]:
    """Return the files as the manifest names them."""
    paths = [Path(file) for file in files]
    return tuple(SourceFile(name=p.name, sha256=file_hash(p), num_bytes=p.stat().st_size) for p in paths)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what Polars raises while `what` is read into one typed line.

    Raises:
        SchemaError: files of one log have different columns or types.
        DataError: a file is broken, empty or unreadable.
    """
    try:
        yield
    except (pl.exceptions.SchemaError, pl.exceptions.ColumnNotFoundError) as error:
        raise SchemaError(
            f"{what}: expected the same columns and types in every file: {_first_line(error)}. Mend the file."
        ) from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{what}: cannot be read: {_first_line(error)}. Mend or replace the file.") from error


def _is_part(file: Path) -> bool:
    # Other engines put _metadata and .part.crc files beside the parts.
    return file.is_file() and not file.name.startswith((".", "_")) and _format(file) is not None


def _format(file: Path) -> Format | None:
    for name, suffixes in _SUFFIXES.items():
        if file.name.lower().endswith(suffixes):
            return name
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
