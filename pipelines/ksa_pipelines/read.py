"""Reading a log: mapped, checked, audited, cleaned and filtered, with a count for everything that is dropped."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ksa_pipelines.checks import REASON, mark_rejected, refuse_milliseconds, refuse_nothing_left
from ksa_pipelines.clean import DUPLICATE, keep_active_users, keep_frequent_items, mark_duplicates
from ksa_pipelines.columns import map_columns
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.report import Report, listed, tally
from ksa_pipelines.sources import find_files, reading, scan
from ksa_pipelines.ties import audit_ties
from recsys_ksa.data.manifest import SourceFile, SourceLog, TieAudit, file_hash


@dataclass(frozen=True)
class Log:
    """A log that was read."""

    events: pl.DataFrame
    """`ROW`, user_id, item_id, timestamp and where there event_type, event_id; rows in the order of the log."""
    source: SourceLog
    audit: TieAudit


def read_log(log: str, config: PrepareConfig, report: Report) -> Log:
    """Read a log and drop what is no event, what is there twice, and what the filters leave out, in this order.

    Raises:
        SchemaError: a column is missing, of a wrong type, or the times cannot be Unix seconds.
        DataError: a file is missing or broken, or nothing is left.
    """
    files_format, files = find_files(log)
    with reading(log):
        raw = scan(files_format, files)
        schema = dict(raw.collect_schema())
        rows = raw.pipe(map_columns, config.columns, schema, log).pipe(mark_rejected, config).collect()
    refuse_milliseconds(rows.lazy(), config, log)
    rejected = tally(rows[REASON])
    report(f"read {rows.height:,} rows{listed('rejected', rejected)}")

    events = _without(rows, REASON)
    refuse_nothing_left(events.height, log, rejected)
    audit = audit_ties(events.lazy(), "id" if "event_id" in events.columns else "arrival")

    marked = events.lazy().pipe(mark_duplicates, events.columns).collect()
    duplicates = tally(marked[DUPLICATE])
    distinct = _without(marked, DUPLICATE)
    report(f"{distinct.height:,} distinct events{listed('dropped', duplicates)}")

    kept, filtered = _filter(distinct, config)
    if filtered:
        report(f"{kept.height:,} events kept{listed('dropped', filtered)}")
    refuse_nothing_left(kept.height, log, rejected | duplicates | filtered)
    source = SourceLog(
        number=0,
        files=source_files(files),
        first_arrival=0,
        num_rows=rows.height,
        rejected=rejected,
        duplicates=duplicates,
        filtered=filtered,
    )
    return Log(kept, source, audit)


def source_files(files: list[Path]) -> tuple[SourceFile, ...]:
    """Return the files as the manifest names them."""
    return tuple(SourceFile(name=f.name, sha256=file_hash(f), num_bytes=f.stat().st_size) for f in files)


def _filter(events: pl.DataFrame, config: PrepareConfig) -> tuple[pl.DataFrame, dict[str, int]]:
    frequent = events.lazy().pipe(keep_frequent_items, config.min_item_count).collect()
    active = frequent.lazy().pipe(keep_active_users, config.min_user_events).collect()
    dropped = {
        f"of items with fewer than {config.min_item_count}": events.height - frequent.height,
        f"of users with then fewer than {config.min_user_events}": frequent.height - active.height,
    }
    return active, {name: count for name, count in dropped.items() if count}


def _without(rows: pl.DataFrame, mark: str) -> pl.DataFrame:
    return rows.filter(pl.col(mark).is_null()).drop(mark)
