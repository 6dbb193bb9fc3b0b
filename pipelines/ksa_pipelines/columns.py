"""Mapping a log's columns to `recsys_ksa.schema.EVENTS`: names, then types."""

import polars as pl

from ksa_pipelines.config import ColumnsConfig, ReadConfig
from ksa_pipelines.sources import ROW
from recsys_ksa.errors import SchemaError

Schema = dict[str, pl.DataType]
_PLAIN = ReadConfig()
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def map_columns(
    frame: pl.LazyFrame, config: ColumnsConfig, schema: Schema, source: str, read: ReadConfig = _PLAIN
) -> pl.LazyFrame:
    """Return `ROW`, user_id, item_id (string), timestamp (int64 seconds) and, where there, event_type, event_id, value.

    What cannot be read as such becomes null; `checks.mark_rejected` counts it. Datetimes without a zone are UTC.

    Raises:
        SchemaError: a column is missing or has a type that is no id or no time.
    """
    columns = [pl.col(ROW).cast(pl.UInt64)]
    for target in ("user_id", "item_id"):
        columns.append(id_column(schema, getattr(config, target), source).alias(target))
    columns.append(_timestamp_column(schema, config.timestamp, source, read).alias("timestamp"))
    for target in ("event_type", "event_id"):
        name = getattr(config, target)
        if name != "" and (name is not None or target in schema):
            columns.append(text_column(schema, name or target, source).alias(target))
    if config.value is not None:
        columns.append(_value_column(schema, config.value, source).alias("value"))
    return frame.select(columns)


def column_kinds(config: ColumnsConfig, schema: Schema) -> dict[str, str]:
    """Return the mapped columns that a file has, each as `integer`, `text`, `time` or `null`."""
    kinds = {}
    for target in ("user_id", "item_id", "timestamp", "event_type", "event_id"):
        name = getattr(config, target)
        name = target if name is None else name
        if name in schema:
            kinds[target] = _kind(schema[name])
    if config.value in schema:
        kinds["value"] = "number"
    return kinds


def _kind(kind: pl.DataType) -> str:
    if kind.is_integer():
        return "integer"
    return "time" if kind.is_temporal() else "null" if kind == pl.Null else "text"


def id_column(schema: Schema, name: str, source: str) -> pl.Expr:
    """Return the column `name` as strings.

    Raises:
        SchemaError: it is missing, or neither strings, categories nor integers.
    """
    kind = column_type(schema, name, source)
    if not (kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise SchemaError(f"{source}: column {name!r}: expected strings or integers, got {kind}. Cast the column.")
    return pl.col(name).cast(pl.String)


def text_column(schema: Schema, name: str, source: str) -> pl.Expr:
    """Return the column `name` as strings like `id_column`, empty ones as null: for what an event may lack."""
    text = id_column(schema, name, source)
    return pl.when(text != "").then(text)


def column_type(schema: Schema, name: str, source: str) -> pl.DataType:
    """Return the type of a column.

    Raises:
        SchemaError: it is missing; the message says which columns are there.
    """
    if name not in schema:
        there = ", ".join(column for column in schema if column != ROW)
        raise SchemaError(
            f"{source}: expected a column {name!r}, got {there}. Map it in the prepare file ([columns] or [items])."
        )
    return schema[name]


def _value_column(schema: Schema, name: str, source: str) -> pl.Expr:
    """Return the column `name` as float32; NaN where there is no number: histories hold no nulls."""
    kind = column_type(schema, name, source)
    if not (kind.is_numeric() or kind in (pl.String, pl.Null)):
        raise SchemaError(f"{source}: column {name!r}: expected numbers, got {kind}. Cast the column.")
    return pl.col(name).cast(pl.Float32, strict=False).fill_nan(None).fill_null(float("nan"))


def _timestamp_column(schema: Schema, name: str, source: str, read: ReadConfig) -> pl.Expr:
    kind = column_type(schema, name, source)
    column = pl.col(name)
    if kind.is_integer() or kind == pl.Null:
        return _seconds(column, read)
    if kind == pl.Datetime or kind == pl.Date:
        return _whole_seconds(column)
    if kind == pl.String:
        text = column.str.strip_chars()
        if read.time_format is not None:
            return _whole_seconds(text.str.to_datetime(read.time_format, time_unit="us", strict=False))
        plain = text.str.strip_suffix("Z").str.strip_suffix(" UTC").str.replace("T", " ", literal=True)
        parsed = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="us", strict=False)
        return pl.coalesce(_seconds(text, read), _whole_seconds(parsed))
    raise SchemaError(
        f"{source}: column {name!r}: expected integers (Unix seconds) or datetimes, got {kind}. Cast the column."
    )


def _seconds(column: pl.Expr, read: ReadConfig) -> pl.Expr:
    return column.cast(pl.Int64, strict=False).floordiv(_PER_SECOND[read.time_unit])


def _whole_seconds(datetime: pl.Expr) -> pl.Expr:
    return datetime.cast(pl.Datetime("us")).dt.epoch("us").floordiv(1_000_000)
