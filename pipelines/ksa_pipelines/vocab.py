"""Numbering of items, categories and users, frozen with the data set.

Items: by (first timestamp, id as bytes), from 1; 0 is the unknown item. Categories: by value as bytes, from 1.
Users: bucket = first 8 bytes of SHA-256(user id) mod num_buckets, user_index = bucket + num_buckets * n, n counting
the bucket's users by (first timestamp, id as bytes). A later log counts on, so nobody is ever renumbered.
"""

import hashlib

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ksa_pipelines.columns import Schema, id_column, text_column
from ksa_pipelines.config import ItemsConfig
from ksa_pipelines.item_features import feature_columns
from recsys_ksa.errors import SchemaError
from recsys_ksa.order import item_hash

MAX_EVENT_TYPES = 127
_VOCABULARY = pl.Schema({"index": pl.Int32, "value": pl.String, "count": pl.Int64})


class ItemCounts:
    """Events and first time of each item, by its code in the log, added up a bucket at a time."""

    def __init__(self, num_items: int) -> None:
        self.count = np.zeros(num_items, dtype=np.int64)
        self._first_seen = np.full(num_items, np.iinfo(np.int64).max)

    def add(self, counts: pl.DataFrame) -> None:
        """Add a bucket's item (code, each once), count, first_seen."""
        item = counts["item"].to_numpy()
        self.count[item] += counts["count"].to_numpy()
        self._first_seen[item] = np.minimum(self._first_seen[item], counts["first_seen"].to_numpy())

    def total(self, item_ids: pl.Series, item_index: NDArray[np.int32]) -> pl.DataFrame:
        """Return item_id, item_index, count, first_seen of the items that have events, by code."""
        columns = {"item_id": item_ids, "item_index": item_index, "count": self.count, "first_seen": self._first_seen}
        return pl.DataFrame(columns).filter(pl.col("count") > 0)


def number_items(counts: pl.DataFrame, num_known: int = 0) -> pl.DataFrame:
    """item_id, count, first_seen -> the same with item_index (int32, from `num_known` + 1), in its order."""
    ordered = counts.sort("first_seen", pl.col("item_id").cast(pl.Binary))
    return ordered.with_row_index("item_index", offset=num_known + 1).with_columns(pl.col("item_index").cast(pl.Int32))


def user_bucket(user_id: str, num_buckets: int) -> int:
    """Return the first 8 bytes, big-endian, of SHA-256(user id as UTF-8), mod `num_buckets`."""
    return int.from_bytes(hashlib.sha256(user_id.encode()).digest()[:8], "big") % num_buckets


def user_buckets(user_ids: pl.Series, num_buckets: int) -> NDArray[np.uint16]:
    """Return `user_bucket` of each id, uint16."""
    digests = b"".join([hashlib.sha256(user_id).digest() for user_id in user_ids.cast(pl.Binary).to_list()])
    return (np.frombuffer(digests, dtype=">u8")[::4] % np.uint64(num_buckets)).astype(np.uint16)


def count_categories(values: pl.Series) -> pl.DataFrame:
    """Categories, nulls too -> value, count."""
    counts = values.alias("value").cast(pl.String).value_counts(name="count")
    return counts.with_columns(pl.col("count").cast(pl.Int64))


def number_categories(counts: pl.DataFrame, known: pl.DataFrame | None = None) -> pl.DataFrame:
    """value, count (a null value: unknown) -> the vocabulary index (int32), value, count; row 0 is the unknown.

    Args:
        counts: as `count_categories` returns it.
        known: the vocabulary so far; its categories keep their numbers, new ones come after, by bytes.
    """
    if known is None:
        known = pl.DataFrame({"index": [0], "value": [None], "count": [0]}, schema=_VOCABULARY)
    # A null beside row 0 is a category that `ksa forget` blanked; nothing is ever counted for it again.
    added = counts.select("value", pl.col("count").alias("added"))
    unknown = added.filter(pl.col("value").is_null())["added"].sum()
    known = known.join(added, on="value", how="left", maintain_order="left")
    more = pl.when(pl.col("index") == 0).then(unknown).otherwise(pl.col("added").fill_null(0))
    known = known.select("index", "value", pl.col("count") + more)
    new = counts.drop_nulls("value").join(known, on="value", how="anti").sort(pl.col("value").cast(pl.Binary))
    new = new.with_row_index("index", offset=known.height).select(_VOCABULARY.names())
    return pl.concat([known, new.cast(_VOCABULARY)])


def refuse_many_event_types(count: int) -> None:
    """Refuse more event types than an int8 numbers.

    Raises:
        SchemaError: more than 127.
    """
    if count > MAX_EVENT_TYPES:
        raise SchemaError(
            f"event_type: expected at most {MAX_EVENT_TYPES} types, got {count}. Map another column, or none "
            "(event_type = '')."
        )


def map_item_columns(frame: pl.LazyFrame, config: ItemsConfig, schema: Schema, source: str) -> pl.LazyFrame:
    """The items file -> item_id, side features, title as strings; empty ones are null, an id's first row stays.

    Features of several categories come as lists of strings, vectors as lists of numbers.

    Raises:
        SchemaError: a column is missing or of a type that is no category.
    """
    columns = [id_column(schema, config.item_id, source).alias("item_id")]
    for name in config.side_features:
        columns.append(text_column(schema, name, source).alias(name))
    columns += feature_columns(config, schema, source)
    if config.title != "" and (config.title is not None or "title" in schema):
        columns.append(text_column(schema, config.title or "title", source).alias("title"))
    return frame.select(columns).drop_nulls("item_id").unique("item_id", keep="first", maintain_order=True)


def item_hashes(item_ids: pl.Series) -> pl.Series:
    """Return `recsys_ksa.order.item_hash` of each item id, uint64."""
    return pl.Series("item_hash", [item_hash(item_id) for item_id in item_ids], dtype=pl.UInt64)
