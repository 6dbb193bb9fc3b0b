"""Reading logs in the formats people have, each file as a lazy frame with a row number.

A log is a file, a folder (with Hive partitions or without), a pattern, a Delta or Iceberg table, or an address that
Polars reads by itself (s3://, gs://, az://, hf://, https://).
"""

import glob
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import polars as pl

from ksa_pipelines.config import Format, ReadConfig
from recsys_ksa.data.hashes import file_hash
from recsys_ksa.data.manifest import SourceFile
from recsys_ksa.errors import DataError, MissingPackageError, SchemaError

File = Path | str
"""A file or table, or the address of one that Polars reads by itself."""
ROW = "__row"
"""Column of the row number in its file, from 0."""
_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "csv": (".csv", ".tsv", ".dat", ".data"),
    "ndjson": (".ndjson", ".jsonl"),
    "ipc": (".arrow", ".ipc", ".feather"),
}
_COMPRESSED = (".gz", ".zst")
"""Of CSV and NDJSON."""
_PACKAGES = {"delta": "deltalake", "iceberg": "pyiceberg"}
_PLAIN = ReadConfig()


def find_files(log: str, read: ReadConfig = _PLAIN) -> tuple[Format, Sequence[File]]:
    """Return the format and the files of a log, in order of name.

    Args:
        log: a file, a folder, a pattern with `*`, a table, or an address.
        read: may name the format where a name does not tell it.

    Raises:
        DataError: there is nothing, a format that is not read, or more than one.
    """
    path = Path(log)
    if "://" in log:
        files: Sequence[File] = [log]
    elif path.is_dir():
        table = read.format or _table_format(path)
        if table in _PACKAGES:
            return table, [path]
        files = sorted(file for file in path.rglob("*") if _is_part(file, path, read))
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(log, recursive=True) if Path(name).is_file())
    if not files:
        raise DataError(f"{log}: expected a file, a folder of log files, or a pattern; found none. Check it.")
    formats: set[Format | None] = {read.format or _format(file) for file in files}
    found = formats.pop()
    if found is None or formats:
        known = ", ".join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
        raise DataError(
            f"{log}: expected files of one format ({known}; CSV and NDJSON also with .gz or .zst), "
            f"got {', '.join(Path(file).name for file in files[:5])}. Rename or convert them, or say [read] format."
        )
    return found, files


def scan(files_format: Format, file: File, read: ReadConfig = _PLAIN) -> pl.LazyFrame:
    """Return a file as a lazy frame, with `ROW` and the columns that its path has as `name=value` folders.

    CSV columns are all strings: ids keep their leading zeros.

    Raises:
        MissingPackageError: a table format needs a package that is not installed.
    """
    frame = _SCANS[files_format](file, read).with_row_index(ROW)
    folders = re.findall(r"(?:^|/)([A-Za-z_]\w*)=([^/]*)(?=/)", str(file)) if "=" in str(file) else []
    if folders:
        there = frame.collect_schema().names()
        frame = frame.with_columns(pl.lit(unquote(value)).alias(name) for name, value in folders if name not in there)
    return frame


def scan_all(files_format: Format, files: Sequence[File], read: ReadConfig = _PLAIN) -> pl.LazyFrame:
    """Return all files as one lazy frame; they must have the same columns."""
    return pl.concat([scan(files_format, file, read) for file in files])


def source_files(files: Sequence[File]) -> tuple[SourceFile, ...]:
    """Return the files as the manifest names them; of an address there is no hash, of a table one of its file list."""
    return tuple(_source_file(file) for file in files)


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
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        # A Parquet file whose pages are damaged can make Polars panic.
        raise DataError(f"{what}: cannot be read: {_first_line(error)}. Mend or replace the file.") from error


def _scan_csv(file: File, read: ReadConfig) -> pl.LazyFrame:
    name = str(file).lower().removesuffix(".gz").removesuffix(".zst")
    options: dict[str, Any] = {
        "separator": read.separator or ("\t" if name.endswith((".tsv", ".data")) else ","),
        "infer_schema": False,
        "quote_char": '"' if read.quoted else None,
    }
    if read.header:
        return pl.scan_csv(file, has_header=False, new_columns=list(read.header), **options)
    return pl.scan_csv(file, **options)


def _scan_ndjson(file: File, read: ReadConfig) -> pl.LazyFrame:
    return pl.scan_ndjson(file, infer_schema_length=10_000)


def _scan_parquet(file: File, read: ReadConfig) -> pl.LazyFrame:
    return pl.scan_parquet(file, hive_partitioning=False)


def _scan_ipc(file: File, read: ReadConfig) -> pl.LazyFrame:
    return pl.scan_ipc(file, hive_partitioning=False)


def _scan_delta(file: File, read: ReadConfig) -> pl.LazyFrame:
    _need("delta", file)
    return pl.scan_delta(str(file))


def _scan_iceberg(file: File, read: ReadConfig) -> pl.LazyFrame:
    _need("iceberg", file)
    os.environ.setdefault("POLARS_ICEBERG_PLANNER", "pyiceberg")  # the other planner is one more package
    metadata = sorted(Path(file, "metadata").glob("*.metadata.json"))
    return pl.scan_iceberg(str(metadata[-1]) if metadata else str(file))


_SCANS = {
    "parquet": _scan_parquet,
    "csv": _scan_csv,
    "ndjson": _scan_ndjson,
    "ipc": _scan_ipc,
    "delta": _scan_delta,
    "iceberg": _scan_iceberg,
}
assert set(_SCANS) == set(get_args(Format))


def _need(table: Format, file: File) -> None:
    package = _PACKAGES[table]
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:
        found = False
    if not found:
        raise MissingPackageError(
            f"{file}: expected the package {package} to read a table of this kind, it is not installed. "
            f"Run `pip install recsys-ksa[{table}]`."
        )


def _table_format(folder: Path) -> Format | None:
    if (folder / "_delta_log").is_dir():
        return "delta"
    return "iceberg" if list(folder.glob("metadata/*.metadata.json")) else None


def _is_part(file: Path, folder: Path, read: ReadConfig) -> bool:
    # Other engines put _metadata, _SUCCESS and .part.crc files beside the parts.
    names = file.relative_to(folder).parts
    hidden = any(name.startswith((".", "_")) for name in names)
    return file.is_file() and not hidden and (read.format is not None or _format(file) is not None)


def _format(file: File) -> Format | None:
    name = str(file).split("?", 1)[0].lower()
    for compressed in _COMPRESSED:
        if name.endswith(compressed):
            name = name.removesuffix(compressed)
            return next((kind for kind in ("csv", "ndjson") if name.endswith(_SUFFIXES[kind])), None)
    return next((kind for kind, suffixes in _SUFFIXES.items() if name.endswith(suffixes)), None)


def _source_file(file: File) -> SourceFile:
    if isinstance(file, str):
        return SourceFile(name=file, sha256="", num_bytes=0)
    if file.is_dir():
        listed = sorted(
            (str(each.relative_to(file)), each.stat().st_size) for each in file.rglob("*") if each.is_file()
        )
        digest = hashlib.sha256(repr(listed).encode()).hexdigest()
        return SourceFile(name=file.name, sha256=digest, num_bytes=sum(size for _, size in listed))
    return SourceFile(name=file.name, sha256=file_hash(file), num_bytes=file.stat().st_size)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
