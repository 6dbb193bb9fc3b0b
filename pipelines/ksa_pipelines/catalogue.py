"""The tables of what events speak of: items.parquet and the categorical vocabularies."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.config import ItemsConfig, PrepareConfig
from ksa_pipelines.item_features import unknown_row, vector_length, with_category_indices, with_vector
from ksa_pipelines.report import Report
from ksa_pipelines.sources import find_files, reading, scan_all, source_files
from ksa_pipelines.vocab import (
    count_categories,
    map_item_columns,
    number_categories,
    number_items,
    refuse_many_event_types,
)
from ksa_pipelines.write import write_table
from recsys_ksa.data.manifest import Manifest, SourceFile, check_file, versioned
from recsys_ksa.errors import SchemaError
from recsys_ksa.schema import ITEMS, UNKNOWN_CATEGORY, UNKNOWN_ITEM, VOCABULARY, vector_column


@dataclass(frozen=True)
class Catalogue:
    """What a data set knows of items and categories."""

    items: pl.DataFrame
    """items.parquet by item_index, row 0 (the unknown item) included."""
    vocab: dict[str, pl.DataFrame]
    """vocab/<name>.parquet by name."""
    items_files: tuple[SourceFile, ...] = ()
    items_described: int = 0
    """Items of the log that the items file describes."""

    @property
    def num_items(self) -> int:
        """Items without row 0."""
        return self.items.height - 1

    def event_types(self) -> tuple[str | None, ...] | None:
        """Return the event types by index, or None where the log has none."""
        return tuple(self.vocab["event_type"]["value"]) if "event_type" in self.vocab else None


@dataclass(frozen=True)
class Counted:
    """What a log's events count."""

    items: pl.DataFrame
    """item_id, item_index (0 where the data set does not know it), count, first_seen."""
    event_types: dict[str | None, int] | None = field(default=None)
    """Events by type; None where the log has no types."""


def read_catalogue(dataset: Path, manifest: Manifest) -> Catalogue:
    """Return the catalogue of a data set.

    Raises:
        DataError: a table is missing or altered.
    """

    def table(name: str) -> pl.DataFrame:
        return pl.read_parquet(check_file(dataset, manifest, manifest.table_file(name)))

    vocab = {name: table(f"vocab/{name}.parquet").sort("index") for name in manifest.vocabularies}
    return Catalogue(table("items.parquet").sort("item_index"), vocab, manifest.items_files, manifest.items_described)


def extend_catalogue(
    known: Catalogue | None, counted: Counted, items: str | None, config: PrepareConfig, report: Report
) -> Catalogue:
    """Return the catalogue with a log's items and event types: known ones keep their numbers, new ones come after.

    Args:
        known: of the data set the log is appended to; None for a first log.
        counted: the log's items and event types.
        items: the items file, or None; describes the new items.
        config: names of its columns.
        report: is told how many items it describes.

    Raises:
        SchemaError: the items file lacks a column, side features are asked for without one, or there are more event
            types than an int8 holds.
        DataError: the items file is missing or broken.
    """
    described, files = read_items_file(items, config, needed=known is None)
    before = known or Catalogue(_unknown_item(config.items, described, items), {})
    is_new = pl.col("item_index") == UNKNOWN_ITEM
    new = number_items(counted.items.filter(is_new).drop("item_index"), before.num_items)
    num_described = new.join(described, on="item_id", how="semi").height
    table = new.join(described, on="item_id", how="left", maintain_order="left")
    vocab: dict[str, pl.DataFrame] = {}
    if counted.event_types is not None:
        types = pl.DataFrame(
            {"value": list(counted.event_types), "count": list(counted.event_types.values())},
            schema={"value": pl.String, "count": pl.Int64},
        )
        vocab["event_type"] = number_categories(types, before.vocab.get("event_type"))
        refuse_many_event_types(vocab["event_type"].height - 1)
    for name in config.items.side_features:
        values = table[name] if name in table.columns else pl.Series(name, [None] * table.height, dtype=pl.String)
        vocab[name] = number_categories(count_categories(values), before.vocab.get(name))
        table = table.with_columns(values).pipe(with_category_index, name, vocab[name])
    for name in config.items.multi_features:
        values = table[name] if name in table.columns else _nothing(name, pl.List(pl.String), table.height)
        vocab[name] = number_categories(count_categories(values.explode()), before.vocab.get(name))
        table = table.with_columns(values).pipe(with_category_indices, name, vocab[name])
    for name in config.items.vectors:
        values = table[name] if name in table.columns else _nothing(name, pl.List(pl.Float32), table.height)
        length = before.items[vector_column(name)].dtype.shape[0]  # pyright: ignore[reportAttributeAccessIssue]
        table = table.with_columns(values).pipe(with_vector, name, length, items)
    if items is not None:
        report(f"the items file describes {num_described:,} of {new.height:,} new items")
    rows = pl.concat([_counted_again(before.items, counted.items.filter(~is_new)), table], how="diagonal_relaxed")
    return Catalogue(
        rows.select(before.items.columns), vocab, before.items_files + files, before.items_described + num_described
    )


def write_catalogue(catalogue: Catalogue, dataset: Path, version: int) -> None:
    """Write items.parquet and vocab/*.parquet of a version."""
    write_table(_items_table(catalogue.items), dataset / versioned("items.parquet", version))
    for name, frame in catalogue.vocab.items():
        write_table(to_arrow(frame).cast(VOCABULARY), dataset / versioned(f"vocab/{name}.parquet", version))


def read_items_file(
    items: str | None, config: PrepareConfig, *, needed: bool
) -> tuple[pl.DataFrame, tuple[SourceFile, ...]]:
    """Return item_id, side features and title as strings; without a file, an empty frame.

    Raises:
        SchemaError, DataError: as `extend_catalogue` says.
    """
    if items is None:
        wanted = [*config.items.vocabularies, *config.items.vectors]
        if wanted and needed:
            raise SchemaError(
                f"items.side_features {wanted}: expected an items file that has them, got none. Give --items FILE."
            )
        return pl.DataFrame(schema={"item_id": pl.String}), ()
    files_format, files = find_files(items)
    with reading(items):
        raw = scan_all(files_format, files)
        described = raw.pipe(map_item_columns, config.items, dict(raw.collect_schema()), items).collect()
    return described, source_files(files)


def with_category_index(items: pl.DataFrame, name: str, vocabulary: pl.DataFrame) -> pl.DataFrame:
    """Add the column `<name>_index`: the category's index in the vocabulary, 0 where unknown."""
    codes = vocabulary.drop_nulls("value").select(
        pl.col("value").alias(name), pl.col("index").cast(pl.Int32).alias(f"{name}_index")
    )
    joined = items.join(codes, on=name, how="left", maintain_order="left")
    return joined.with_columns(pl.col(f"{name}_index").fill_null(UNKNOWN_CATEGORY))


def _nothing(name: str, kind: pl.DataType, height: int) -> pl.Series:
    return pl.Series(name, [None] * height, dtype=kind)


def _unknown_item(config: ItemsConfig, described: pl.DataFrame, source: str | None) -> pl.DataFrame:
    """Return row 0, the unknown item; columns as `schema.ITEMS` says."""
    side_features = config.side_features
    lengths = {name: vector_length(name, described, source) for name in config.vectors}
    more = unknown_row(config.multi_features, lengths)
    row = {"item_index": UNKNOWN_ITEM, "item_id": None, "count": 0, "first_seen": None}
    kinds: dict[str, type[pl.DataType]] = dict(zip(row, (pl.Int32, pl.String, pl.Int64, pl.Int64)))
    row |= {f"{name}_index": UNKNOWN_CATEGORY for name in side_features}
    kinds |= {f"{name}_index": pl.Int32 for name in side_features}
    if "title" in described.columns:
        row, kinds = row | {"title": None}, kinds | {"title": pl.String}
    return pl.concat([pl.DataFrame([row], schema=kinds), more], how="horizontal")


def _counted_again(items: pl.DataFrame, counts: pl.DataFrame) -> pl.DataFrame:
    """Return known items with a later log's events counted and their first time moved back where it is late."""
    index = counts["item_index"].to_numpy()
    count, seen = np.zeros(items.height, dtype=np.int64), np.zeros(items.height, dtype=np.int64)
    count[index], seen[index] = counts["count"].to_numpy(), counts["first_seen"].to_numpy()
    seen = pl.when(pl.Series(count > 0)).then(pl.Series(seen))
    return items.with_columns(pl.col("count") + count, pl.min_horizontal("first_seen", seen).alias("first_seen"))


def _items_table(items: pl.DataFrame) -> pa.Table:
    fields = [*ITEMS]
    for name, kind in list(items.schema.items())[len(ITEMS) :]:
        if name == "title":
            fields.append(pa.field(name, pa.string()))
        elif isinstance(kind, pl.List):
            fields.append(pa.field(name, pa.list_(pa.int32()), nullable=False))
        elif isinstance(kind, pl.Array):
            fields.append(pa.field(name, pa.list_(pa.float32(), kind.shape[0]), nullable=False))
        else:
            fields.append(pa.field(name, pa.int32(), nullable=False))
    return to_arrow(items).cast(pa.schema(fields))
