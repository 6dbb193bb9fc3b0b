"""Dropping events that are there twice."""

import polars as pl

from ksa_pipelines.report import tally

_COLUMNS = ("user", "item", "timestamp", "event_type", "event_id")
_ORDER = "order"

DUPLICATE = "duplicate"
SAME_ID = "same event_id"
SAME_ID_OTHER_PAYLOAD = "same event_id, other payload"
SAME_EVENT = "same user, item, time and type"


def drop_duplicates(events: pl.DataFrame, old: pl.DataFrame | None = None) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the events that are not there twice, in their order, and how many were dropped by which rule.

    With an event id: the user's same id. Without: the same user, item, time and type. The first by arrival stays;
    old events came before all.

    Args:
        events: user, item, timestamp, arrival and, where the log has them, event_type and event_id.
        old: the same without arrival, in the data set already.
    """
    marked = events.with_columns(_marks(events, old))
    return marked.filter(pl.col(DUPLICATE).is_null()).drop(DUPLICATE), tally(marked[DUPLICATE])


def _marks(events: pl.DataFrame, old: pl.DataFrame | None) -> pl.Series:
    """[events] null for an event, else the rule by which an earlier one was the same."""
    columns = [name for name in _COLUMNS if name in events.columns]
    rows = events.select(*columns, pl.col("arrival").cast(pl.Int64).alias(_ORDER))
    if old is not None and old.height:
        before = old.select(*columns, pl.lit(-1, dtype=pl.Int64).alias(_ORDER))
        rows = pl.concat([before, rows])
    return rows.lazy().pipe(mark_duplicates).collect()[DUPLICATE].tail(events.height)


def mark_duplicates(events: pl.LazyFrame) -> pl.LazyFrame:
    """Add the column `duplicate`: null for an event, else the rule by which an earlier row was the same one."""
    columns = events.collect_schema().names()
    payload = [name for name in ("item", "timestamp", "event_type") if name in columns]
    later = pl.col(_ORDER) > pl.col(_ORDER).min().over("user", *payload)
    if "event_id" not in columns:
        return events.with_columns(pl.when(later).then(pl.lit(SAME_EVENT)).alias(DUPLICATE))
    first = pl.col(_ORDER) > pl.col(_ORDER).min().over("user", "event_id")
    same = pl.struct(payload)
    other = same != same.sort_by(_ORDER).first().over("user", "event_id")
    by_id = pl.when(first & other).then(pl.lit(SAME_ID_OTHER_PAYLOAD)).when(first).then(pl.lit(SAME_ID))
    without_id = pl.col(_ORDER) > pl.col(_ORDER).min().over("user", *payload, pl.col("event_id").is_null())
    return events.with_columns(
        pl.when(pl.col("event_id").is_null())
        .then(pl.when(without_id).then(pl.lit(SAME_EVENT)))
        .otherwise(by_id)
        .alias(DUPLICATE)
    )
