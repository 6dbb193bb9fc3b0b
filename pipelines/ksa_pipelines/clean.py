"""Dropping events that are there twice, and the filters of the prepare file."""

import polars as pl

from ksa_pipelines.sources import ROW

DUPLICATE = "duplicate"
SAME_ID = "same event_id"
SAME_ID_OTHER_PAYLOAD = "same event_id, other payload"
SAME_EVENT = "same user, item, time and type"


def mark_duplicates(events: pl.LazyFrame, columns: list[str]) -> pl.LazyFrame:
    """Add the column `duplicate`: null for an event, else the rule by which an earlier row was the same one.

    With an event id: the user's same id. Without: the same user, item, time and type. The first row stays.
    """
    payload = [name for name in ("item_id", "timestamp", "event_type") if name in columns]
    same_event = pl.struct("user_id", *payload)
    repeats = pl.col(ROW) > pl.col(ROW).min().over("user_id", *payload)
    plain = pl.when(repeats).then(pl.lit(SAME_EVENT))
    if "event_id" not in columns:
        return events.with_columns(plain.alias(DUPLICATE))
    first = pl.col(ROW) > pl.col(ROW).min().over("user_id", "event_id")
    other = same_event != same_event.sort_by(ROW).first().over("user_id", "event_id")
    by_id = pl.when(first & other).then(pl.lit(SAME_ID_OTHER_PAYLOAD)).when(first).then(pl.lit(SAME_ID))
    without_id = pl.col(ROW) > pl.col(ROW).min().over("user_id", *payload, pl.col("event_id").is_null())
    return events.with_columns(
        pl.when(pl.col("event_id").is_null())
        .then(pl.when(without_id).then(pl.lit(SAME_EVENT)))
        .otherwise(by_id)
        .alias(DUPLICATE)
    )


def keep_frequent_items(events: pl.LazyFrame, min_item_count: int) -> pl.LazyFrame:
    """Keep events of items with at least `min_item_count` events."""
    return events.filter(pl.len().over("item_id") >= min_item_count) if min_item_count > 1 else events


def keep_active_users(events: pl.LazyFrame, min_user_events: int) -> pl.LazyFrame:
    """Keep events of users with at least `min_user_events` events."""
    return events.filter(pl.len().over("user_id") >= min_user_events) if min_user_events > 1 else events
