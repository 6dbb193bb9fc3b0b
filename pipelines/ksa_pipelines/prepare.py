"""The whole way from a log to a prepared data set, read top to bottom."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from ksa_pipelines.catalogue import Catalogue, build_catalogue
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.histories import group_by_user, user_offsets
from ksa_pipelines.read import Log, read_log
from ksa_pipelines.report import Report
from ksa_pipelines.sources import ROW
from ksa_pipelines.split import global_cuts, split_positions
from ksa_pipelines.ties import TieChoice, choose_tie, describe_ties, sort_by_order
from ksa_pipelines.vocab import item_hashes, number_items, number_users
from ksa_pipelines.write import atomic_directory, refuse_existing, write_parts, write_table
from recsys_ksa import __version__
from recsys_ksa.data.cache import write_cache
from recsys_ksa.data.manifest import Counts, Manifest, content_hash, file_hash, split_hash
from recsys_ksa.schema import FORMAT_VERSION

Split = dict[str, dict[str, int]]


def prepare(log: str, target: Path, config: PrepareConfig, items: str | None, report: Report) -> Manifest:
    """Prepare a log into the data set `target` and return its manifest.

    Args:
        log: Parquet or CSV: a file, a folder or a pattern.
        target: the data set to write; must not exist.
        items: the items file, Parquet or CSV, or None.
        report: is told what each step did.

    Raises:
        SchemaError: a column is missing, of a wrong type, or the times cannot be Unix seconds.
        DataError: a file is broken, nothing is left of the log, or `target` exists.
    """
    refuse_existing(target)
    read = read_log(log, config, report)
    tie = choose_tie(read.audit, config.tie)
    report(describe_ties(read.audit, tie))

    numbered = read.events.lazy().pipe(number_items).collect()
    catalogue = build_catalogue(numbered, read.events, items, config, report)
    users = read.events.lazy().pipe(number_users, config.num_buckets).sort("user_index").collect()
    events = number_events(read, numbered, users, catalogue.vocab.get("event_type"))
    ordered = sort_by_order(events, tie.kind)

    user_index, offsets = user_offsets(ordered)
    assert user_index.tolist() == users["user_index"].to_list()
    timestamp = ordered["timestamp"].to_numpy()
    split = global_cuts(config.split, config.clock, int(timestamp.max()))
    histories = group_by_user(ordered, users, split_positions(timestamp, offsets, split), offsets)
    report(f"ordered {histories.num_rows:,} histories")

    manifest = describe(read, config, tie, catalogue, histories, split, np.diff(offsets))
    manifest = write_dataset(target, manifest, catalogue, histories)
    report(f"wrote {target}: {len(manifest.files)} files, content hash {manifest.content_hash[:12]}")
    return manifest


def number_events(read: Log, items: pl.DataFrame, users: pl.DataFrame, event_types: pa.Table | None) -> pl.DataFrame:
    """Return the events by numbers: user_index, item_index, timestamp, arrival and what ties and histories need."""
    items = items.select("item_id", "item_index").with_columns(item_hashes(items))
    events = (
        read.events.lazy()
        .with_columns((pl.col(ROW) + read.source.first_arrival).alias("arrival"))
        .join(items.lazy(), on="item_id", how="left")
        .join(users.lazy(), on="user_id", how="left")
        .drop(ROW, "item_id", "user_id", "bucket")
    )
    if event_types is not None:
        events = events.pipe(number_event_types, event_types)
    return events.collect()


def number_event_types(events: pl.LazyFrame, vocabulary: pa.Table) -> pl.LazyFrame:
    """Turn event_type into its index (int8, 0 where null); the name stays as event_type_name."""
    names = pl.LazyFrame(pl.DataFrame(vocabulary)).drop_nulls("value")
    codes = names.select(pl.col("value").alias("event_type_name"), pl.col("index").cast(pl.Int8).alias("event_type"))
    renamed = events.rename({"event_type": "event_type_name"})
    return renamed.join(codes, on="event_type_name", how="left").with_columns(pl.col("event_type").fill_null(0))


def describe(
    read: Log,
    config: PrepareConfig,
    tie: TieChoice,
    catalogue: Catalogue,
    histories: pa.Table,
    split: Split,
    lengths: NDArray[np.int64],
) -> Manifest:
    """Return the manifest, still without the hashes of the files."""
    names = histories.column_names
    counts = Counts(
        users=histories.num_rows,
        items=catalogue.items.num_rows - 1,
        events=int(lengths.sum()),
        shortest_history=int(lengths.min()),
        median_history=float(np.median(lengths)),
        longest_history=int(lengths.max()),
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        code_version=__version__,
        content_hash=content_hash(histories),
        split_hash=split_hash(split, histories),
        clock=config.clock,
        tie=tie.kind,
        tie_chosen_by=tie.chosen_by,
        tie_audit=read.audit,
        num_buckets=config.num_buckets,
        has_event_type="event_type" in names,
        has_event_id="event_id" in names,
        has_title="title" in catalogue.items.column_names,
        side_features=config.items.side_features,
        counts=counts,
        split=split,
        logs=(read.source,),
        items_files=catalogue.items_files,
        items_described=catalogue.items_described,
        config=config.model_dump(mode="json"),
    )


def write_dataset(target: Path, manifest: Manifest, catalogue: Catalogue, histories: pa.Table) -> Manifest:
    """Write the data set whole or not at all; return the manifest with the files' hashes."""
    with atomic_directory(target) as directory:
        write_table(catalogue.items, directory / "items.parquet")
        for name, table in catalogue.vocab.items():
            write_table(table, directory / "vocab" / f"{name}.parquet")
        write_parts(histories, directory, manifest.num_buckets, log_number=0)
        files = sorted(directory.rglob("*.parquet"))
        hashes = {file.relative_to(directory).as_posix(): file_hash(file) for file in files}
        manifest = manifest.model_copy(update={"files": hashes})
        write_cache(directory, histories, manifest.content_hash, manifest.split_hash)
        manifest.save(directory)
    return manifest
