"""Numbering of items, categories and users, frozen with the data set.

Items: by (first timestamp, id as bytes), from 1; 0 is the unknown item. Categories: by value as bytes, from 1.
Users: bucket = first 8 bytes of SHA-256(user id) mod num_buckets, user_index = bucket + num_buckets * n, n counting
the bucket's users by (first timestamp, id as bytes). A later log counts on, so nobody is ever renumbered.
"""

import hashlib

import polars as pl

from ksa_pipelines.columns import Schema, id_column, text_column
from ksa_pipelines.config import ItemsConfig
from recsys_ksa.errors import SchemaError
from recsys_ksa.order import item_hash

MAX_EVENT_TYPES = 127


def number_items(events: pl.LazyFrame) -> pl.LazyFrame:
    """Events with item_id and timestamp -> item_id, count, first_seen, item_index (int32 from 1), in its order."""
    return (
        events.group_by("item_id")
        .agg(pl.len().cast(pl.Int64).alias("count"), pl.col("timestamp").min().alias("first_seen"))
        .sort("first_seen", pl.col("item_id").cast(pl.Binary))
        .with_row_index("item_index", offset=1)
        .with_columns(pl.col("item_index").cast(pl.Int32))
    )


def number_users(events: pl.LazyFrame, num_buckets: int) -> pl.LazyFrame:
    """Events with user_id and timestamp -> user_id, bucket, user_index (int64)."""
    n = pl.int_range(pl.len(), dtype=pl.Int64).over("bucket")
    return (
        events.group_by("user_id")
        .agg(pl.col("timestamp").min().alias("first_seen"))
        .with_columns(bucket_column(num_buckets))
        .sort("first_seen", pl.col("user_id").cast(pl.Binary))
        .select("user_id", "bucket", (pl.col("bucket") + num_buckets * n).alias("user_index"))
    )


def bucket_column(num_buckets: int) -> pl.Expr:
    """Return the bucket of each user_id as an expression, int64."""

    def buckets(user_id: pl.Series) -> pl.Series:
        return pl.Series([user_bucket(user, num_buckets) for user in user_id], dtype=pl.Int64)

    return pl.col("user_id").map_batches(buckets, return_dtype=pl.Int64, is_elementwise=True).alias("bucket")


def user_bucket(user_id: str, num_buckets: int) -> int:
    """Return the first 8 bytes, big-endian, of SHA-256(user id as UTF-8), mod `num_buckets`."""
    return int.from_bytes(hashlib.sha256(user_id.encode()).digest()[:8], "big") % num_buckets


def number_categories(values: pl.LazyFrame, column: str) -> pl.LazyFrame:
    """A column of category values -> index (int32), value, count; row 0 counts the nulls."""
    known = (
        values.select(pl.col(column).alias("value"))
        .drop_nulls()
        .group_by("value")
        .agg(pl.len().cast(pl.Int64).alias("count"))
        .sort(pl.col("value").cast(pl.Binary))
    )
    unknown = values.select(
        pl.lit(None, dtype=pl.String).alias("value"), pl.col(column).null_count().cast(pl.Int64).alias("count")
    )
    return pl.concat([unknown, known]).with_row_index("index").select(pl.col("index").cast(pl.Int32), "value", "count")


def check_event_types(vocabulary: pl.DataFrame) -> None:
    """Refuse more event types than an int8 numbers.

    Raises:
        SchemaError: more than 127.
    """
    if vocabulary.height - 1 > MAX_EVENT_TYPES:
        raise SchemaError(
            f"event_type: expected at most {MAX_EVENT_TYPES} types, got {vocabulary.height - 1}. "
            "Map another column, or none (event_type = '')."
        )


def map_item_columns(frame: pl.LazyFrame, config: ItemsConfig, schema: Schema, source: str) -> pl.LazyFrame:
    """The items file -> item_id, side features, title as strings; empty ones are null, an id's first row stays.

    Raises:
        SchemaError: a column is missing or of a type that is no category.
    """
    columns = [id_column(schema, config.item_id, source).alias("item_id")]
    for name in config.side_features:
        columns.append(text_column(schema, name, source).alias(name))
    if config.title != "" and (config.title is not None or "title" in schema):
        columns.append(text_column(schema, config.title or "title", source).alias("title"))
    return frame.select(columns).drop_nulls("item_id").unique("item_id", keep="first", maintain_order=True)


def item_hashes(items: pl.DataFrame) -> pl.Series:
    """Return `recsys_ksa.order.item_hash` of each row's item_id, uint64."""
    return pl.Series("item_hash", [item_hash(item) for item in items["item_id"]], dtype=pl.UInt64)


def comparison_ranks(item_ids: pl.LazyFrame) -> pl.LazyFrame:
    """item_id -> item_id, rank: integers where all ids are integers, else the order of their bytes."""
    number = pl.col("item_id").cast(pl.Int64, strict=False)
    by_bytes = pl.col("item_id").cast(pl.Binary).rank("dense").cast(pl.Int64)
    return item_ids.select(
        "item_id", pl.when(number.is_not_null().all()).then(number).otherwise(by_bytes).alias("rank")
    )
