"""The whole way from a log to a prepared data set, read top to bottom."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from ksa_pipelines.checks import REASON, mark_rejected, refuse_milliseconds, refuse_nothing_left
from ksa_pipelines.clean import keep_active_users, keep_frequent_items, mark_duplicates
from ksa_pipelines.columns import map_columns
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.histories import group_by_user, user_offsets
from ksa_pipelines.sources import ROW, find_files, reading, scan
from ksa_pipelines.split import global_cuts, split_positions
from ksa_pipelines.ties import audit_ties, sort_by_order
from ksa_pipelines.vocab import (
    check_event_types,
    item_hashes,
    map_item_columns,
    number_categories,
    number_items,
    number_users,
)
from ksa_pipelines.write import atomic_directory, refuse_existing, write_parts, write_table
from recsys_ksa import __version__
from recsys_ksa.data.cache import write_cache
from recsys_ksa.data.manifest import (
    Counts,
    Manifest,
    SourceFile,
    SourceLog,
    TieAudit,
    content_hash,
    file_hash,
    split_hash,
)
from recsys_ksa.errors import SchemaError
from recsys_ksa.order import TieKind
from recsys_ksa.schema import FORMAT_VERSION, ITEMS, VOCABULARY

Report = Callable[[str], None]
"""Told what each step did, in one line."""


@dataclass(frozen=True)
class Log:
    """A log that was read, checked and cleaned."""

    events: pl.DataFrame
    """`ROW`, user_id, item_id, timestamp and where there event_type, event_id; rows in the order of the log."""
    source: SourceLog
    audit: TieAudit


@dataclass(frozen=True)
class Catalogue:
    """The vocabularies of a data set."""

    items: pa.Table
    """items.parquet."""
    vocab: dict[str, pa.Table]
    """vocab/<name>.parquet by name."""


def prepare(log: str, target: Path, config: PrepareConfig, items: str | None, report: Report) -> Manifest:
    """
    Prepare a log into the data set `target` and return its manifest.

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
    tie, chosen_by = choose_tie(read.audit, config)
    report(describe_ties(read.audit, tie, chosen_by))

    numbered_items = read.events.lazy().pipe(number_items).collect()
    catalogue = read_catalogue(numbered_items, read.events, items, config, report)
    users = read.events.lazy().pipe(number_users, config.num_buckets).sort("user_index").collect()
    events = number_events(read, numbered_items, users, catalogue.vocab.get("event_type"))
    ordered = sort_by_order(events, tie)

    user_index, offsets = user_offsets(ordered)
    assert user_index.tolist() == users["user_index"].to_list()
    timestamp = ordered["timestamp"].to_numpy()
    split = global_cuts(config.split, config.clock, int(timestamp.max()))
    histories = group_by_user(ordered, users, split_positions(timestamp, offsets, split), offsets)
    report(f"ordered {histories.num_rows:,} histories")

    lengths = pl.Series(offsets).diff().drop_nulls()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        code_version=__version__,
        content_hash=content_hash(histories),
        split_hash=split_hash(split, histories),
        clock=config.clock,
        tie=tie,
        tie_chosen_by=chosen_by,
        tie_audit=read.audit,
        num_buckets=config.num_buckets,
        has_event_type="event_type" in ordered.columns,
        has_event_id="event_id" in ordered.columns,
        has_title="title" in catalogue.items.column_names,
        side_features=config.items.side_features if items else (),
        counts=Counts(
            users=users.height,
            items=numbered_items.height,
            events=ordered.height,
            shortest_history=lengths.min(),
            median_history=lengths.median(),
            longest_history=lengths.max(),
        ),
        split=split,
        logs=(read.source,),
        config=config.model_dump(mode="json"),
    )
    return write_dataset(target, manifest, catalogue, histories, report)


def read_log(log: str, config: PrepareConfig, report: Report) -> Log:
    """Read, check, audit and clean a log."""
    files_format, files = find_files(log)
    with reading(log):
        raw = scan(files_format, files)
        schema = dict(raw.collect_schema())
        rows = raw.pipe(map_columns, config.columns, schema, log).pipe(mark_rejected, config).collect()
    refuse_milliseconds(rows["timestamp"].max(), config, log)
    rejected = _tally(rows[REASON])
    report(f"read {rows.height:,} rows{_told('rejected', rejected)}")
    events = rows.lazy().filter(pl.col(REASON).is_null()).drop(REASON).collect()
    refuse_nothing_left(events.height, log, rejected)
    audit = audit_ties(events.lazy(), "id" if "event_id" in events.columns else "arrival")

    marked = events.lazy().pipe(mark_duplicates, events.columns).collect()
    duplicates = _tally(marked["duplicate"])
    distinct = marked.lazy().filter(pl.col("duplicate").is_null()).drop("duplicate").collect()
    report(f"{distinct.height:,} distinct events{_told('duplicates', duplicates)}")

    frequent = distinct.lazy().pipe(keep_frequent_items, config.min_item_count).collect()
    active = frequent.lazy().pipe(keep_active_users, config.min_user_events).collect()
    filtered = {
        f"min_item_count {config.min_item_count}": distinct.height - frequent.height,
        f"min_user_events {config.min_user_events}": frequent.height - active.height,
    }
    if distinct.height != active.height:
        report(f"{active.height:,} events kept{_told('filtered', filtered)}")
    refuse_nothing_left(active.height, log, rejected | duplicates | filtered)
    source = SourceLog(
        number=0,
        files=tuple(SourceFile(name=f.name, sha256=file_hash(f), num_bytes=f.stat().st_size) for f in files),
        first_arrival=0,
        num_rows=rows.height,
        rejected=rejected,
        duplicates=duplicates,
        filtered={name: count for name, count in filtered.items() if count},
    )
    return Log(active, source, audit)


def choose_tie(audit: TieAudit, config: PrepareConfig) -> tuple[TieKind, str]:
    """
    Return the tie kind and what chose it: the config, the audit (then `hash`), or the default.

    Raises:
        SchemaError: `id` is asked for and the log has no event ids.
    """
    if config.tie == "id" and audit.order != "id":
        raise SchemaError("tie 'id': expected a log with event ids, got none. Map event_id, or use arrival or hash.")
    if config.tie is not None:
        return config.tie, "config"
    return ("hash", "audit") if audit.is_artefact else (audit.order, "default")


def describe_ties(audit: TieAudit, tie: TieKind, chosen_by: str) -> str:
    """Return the tie audit and the choice as one line."""
    greater = "-" if audit.next_id_greater is None else f"{audit.next_id_greater:.4f}"
    verdict = "the source sorts its ties by item id; " if audit.is_artefact else ""
    return (
        f"ties: {audit.gap_0_share:.1%} of gaps are 0, {audit.tied_target_share:.1%} of last events are tied, "
        f"P(next id > id | tie) = {greater} over {audit.num_tied_pairs:,} pairs: {verdict}{tie} order ({chosen_by})"
    )


def read_catalogue(
    numbered: pl.DataFrame, events: pl.DataFrame, items: str | None, config: PrepareConfig, report: Report
) -> Catalogue:
    """Return items.parquet and the categorical vocabularies."""
    vocab: dict[str, pl.DataFrame] = {}
    if "event_type" in events.columns:
        vocab["event_type"] = events.lazy().pipe(number_categories, "event_type").collect()
        check_event_types(vocab["event_type"], "the log")
    table = numbered
    if items is not None:
        files_format, files = find_files(items)
        with reading(items):
            raw = scan(files_format, files)
            described = raw.pipe(map_item_columns, config.items, dict(raw.collect_schema()), items).collect()
        table = numbered.join(described, on="item_id", how="left", maintain_order="left")
        known = numbered.join(described, on="item_id", how="semi").height
        report(f"items file describes {known:,} of {numbered.height:,} items")
        for name in config.items.side_features:
            vocab[name] = table.lazy().pipe(number_categories, name).collect()
            codes = vocab[name].select(pl.col("value").alias(name), pl.col("index").alias(f"{name}_index"))
            table = table.join(codes, on=name, how="left", maintain_order="left").with_columns(
                pl.col(f"{name}_index").fill_null(0)
            )
    unknown = {"item_index": 0, "count": 0} | {f"{name}_index": 0 for name in config.items.side_features if items}
    rows = pl.concat([pl.DataFrame([unknown]), table], how="diagonal_relaxed").select(
        *ITEMS.names,
        *(pl.col(name).cast(pl.Int32) for name in unknown if name.endswith("_index") and name != "item_index"),
        *(["title"] if "title" in table.columns else []),
    )
    return Catalogue(_items_table(rows), {name: frame.to_arrow().cast(VOCABULARY) for name, frame in vocab.items()})


def number_events(read: Log, items: pl.DataFrame, users: pl.DataFrame, event_types: pa.Table | None) -> pl.DataFrame:
    """Return the events by numbers: user_index, item_index, timestamp, arrival and what ties and histories need."""
    items = items.select("item_id", "item_index").with_columns(item_hashes(items))
    events = (
        read.events.lazy()
        .with_columns((pl.col(ROW) + read.source.first_arrival).alias("arrival"))
        .join(items.lazy(), on="item_id", how="left", maintain_order="left")
        .join(users.lazy(), on="user_id", how="left", maintain_order="left")
        .drop(ROW, "item_id", "user_id", "bucket")
    )
    if event_types is not None:
        names = pl.DataFrame(pl.from_arrow(event_types)).select(
            pl.col("value").alias("event_type"), pl.col("index").cast(pl.Int8).alias("type_index")
        )
        events = (
            events.join(names.lazy().drop_nulls("event_type"), on="event_type", how="left", maintain_order="left")
            .rename({"event_type": "event_type_name", "type_index": "event_type"})
            .with_columns(pl.col("event_type").fill_null(0))
        )
    return events.collect()


def write_dataset(
    target: Path, manifest: Manifest, catalogue: Catalogue, histories: pa.Table, report: Report
) -> Manifest:
    """Write the data set whole or not at all; return the manifest with the files' hashes."""
    with atomic_directory(target) as directory:
        write_table(catalogue.items, directory / "items.parquet")
        for name, table in catalogue.vocab.items():
            write_table(table, directory / "vocab" / f"{name}.parquet")
        write_parts(histories, directory, manifest.num_buckets, log_number=0)
        files = sorted(file for file in directory.rglob("*.parquet"))
        manifest = manifest.model_copy(
            update={"files": {file.relative_to(directory).as_posix(): file_hash(file) for file in files}}
        )
        write_cache(directory, histories, manifest.content_hash, manifest.split_hash)
        manifest.save(directory)
    report(f"wrote {target}: {len(manifest.files)} files, content hash {manifest.content_hash[:12]}")
    return manifest


def _items_table(rows: pl.DataFrame) -> pa.Table:
    table = rows.to_arrow()
    fields = [
        ITEMS.field(name) if name in ITEMS.names else pa.field(name, table.schema.field(name).type)
        for name in table.column_names
    ]
    fields = [pa.field(f.name, pa.string()) if f.name == "title" else f for f in fields]
    return table.cast(pa.schema(fields))


def _tally(reasons: pl.Series) -> dict[str, int]:
    counts = reasons.drop_nulls().value_counts().sort(reasons.name)
    return {str(reason): int(count) for reason, count in counts.iter_rows()}


def _told(what: str, counts: dict[str, int]) -> str:
    parts = [f"{count:,} {reason}" for reason, count in counts.items() if count]
    return f"; {what}: {', '.join(parts)}" if parts else ""
