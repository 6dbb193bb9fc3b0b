"""The tables of what events speak of: items.parquet and the categorical vocabularies."""

from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.read import source_files
from ksa_pipelines.report import Report
from ksa_pipelines.sources import find_files, reading, scan
from ksa_pipelines.vocab import check_event_types, map_item_columns, number_categories
from recsys_ksa.data.manifest import SourceFile
from recsys_ksa.errors import SchemaError
from recsys_ksa.schema import ITEMS, UNKNOWN_CATEGORY, UNKNOWN_ITEM, VOCABULARY


@dataclass(frozen=True)
class ItemsFile:
    """The items file, as far as the log's items are in it."""

    described: pl.DataFrame
    """item_id, the side features and, where there, title; strings."""
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Catalogue:
    """What a data set knows of items and categories."""

    items: pa.Table
    """items.parquet."""
    vocab: dict[str, pa.Table]
    """vocab/<name>.parquet by name."""
    items_files: tuple[SourceFile, ...]
    items_described: int
    """Items of the log that the items file describes."""


def build_catalogue(
    numbered: pl.DataFrame, events: pl.DataFrame, items: str | None, config: PrepareConfig, report: Report
) -> Catalogue:
    """Return the catalogue of a log.

    Args:
        numbered: the log's items as `vocab.number_items` gives them.
        events: the log's events; gives the event types.
        items: the items file, or None.

    Raises:
        SchemaError: the items file lacks a column, side features are asked for without one, or there are more event
            types than an int8 holds.
        DataError: the items file is missing or broken.
    """
    vocab: dict[str, pl.DataFrame] = {}
    if "event_type" in events.columns:
        vocab["event_type"] = events.lazy().pipe(number_categories, "event_type").collect()
        check_event_types(vocab["event_type"])
    read = read_items_file(items, config)
    table = numbered.join(read.described, on="item_id", how="left", maintain_order="left")
    for name in config.items.side_features:
        vocab[name] = table.lazy().pipe(number_categories, name).collect()
        table = table.lazy().pipe(with_category_index, name, vocab[name].lazy()).collect()
    described = numbered.join(read.described, on="item_id", how="semi").height
    if items is not None:
        report(f"the items file describes {described:,} of {numbered.height:,} items")
    tables = {name: frame.to_arrow().cast(VOCABULARY) for name, frame in vocab.items()}
    return Catalogue(_items_table(table, config.items.side_features), tables, read.files, described)


def read_items_file(items: str | None, config: PrepareConfig) -> ItemsFile:
    """Return the items file as strings; without one, an empty one.

    Raises:
        SchemaError, DataError: as `build_catalogue` says.
    """
    if items is None:
        if config.items.side_features:
            raise SchemaError(
                f"items.side_features {list(config.items.side_features)}: expected an items file that has them, got "
                "none. Give --items FILE."
            )
        return ItemsFile(pl.DataFrame(schema={"item_id": pl.String}), ())
    files_format, files = find_files(items)
    with reading(items):
        raw = scan(files_format, files)
        described = raw.pipe(map_item_columns, config.items, dict(raw.collect_schema()), items).collect()
    return ItemsFile(described, source_files(files))


def with_category_index(items: pl.LazyFrame, name: str, vocabulary: pl.LazyFrame) -> pl.LazyFrame:
    """Add the column `<name>_index`: the category's index in the vocabulary, 0 where unknown."""
    codes = vocabulary.drop_nulls("value").select(
        pl.col("value").alias(name), pl.col("index").cast(pl.Int32).alias(f"{name}_index")
    )
    joined = items.join(codes, on=name, how="left", maintain_order="left")
    return joined.with_columns(pl.col(f"{name}_index").fill_null(UNKNOWN_CATEGORY))


def _items_table(items: pl.DataFrame, side_features: tuple[str, ...]) -> pa.Table:
    """Put row 0, the unknown item, before the items; columns as `schema.ITEMS` says."""
    indices = [f"{name}_index" for name in side_features]
    unknown: dict[str, list[int]] = {"item_index": [UNKNOWN_ITEM], "count": [0]}
    unknown |= {name: [UNKNOWN_CATEGORY] for name in indices}
    titles = ["title"] if "title" in items.columns else []
    rows = pl.concat([pl.DataFrame(unknown), items], how="diagonal_relaxed").select(*ITEMS.names, *indices, *titles)
    fields = [*ITEMS, *(pa.field(name, pa.int32(), nullable=False) for name in indices)]
    fields += [pa.field(name, pa.string()) for name in titles]
    return rows.to_arrow().cast(pa.schema(fields))
