"""Which rows of a log are no events, and why."""

import polars as pl

from ksa_pipelines.config import PrepareConfig
from recsys_ksa.errors import DataError, SchemaError

REASON = "reason"
MILLISECONDS = 100_000_000_000
"""Unix seconds of the year 5138: a larger timestamp is in milliseconds or finer."""


def mark_rejected(events: pl.LazyFrame, config: PrepareConfig) -> pl.LazyFrame:
    """Add the column `reason`: null for an event, else why the row is rejected (the first that holds)."""
    timestamp = pl.col("timestamp")
    reasons = [
        ("null user_id", pl.col("user_id").is_null()),
        ("empty user_id", pl.col("user_id") == ""),
        ("null item_id", pl.col("item_id").is_null()),
        ("empty item_id", pl.col("item_id") == ""),
        ("null or unreadable timestamp", timestamp.is_null()),
        ("negative timestamp", timestamp < 0),
    ]
    if config.clock == "unix":
        reasons.append(("far-future timestamp", timestamp > config.max_timestamp))
    reason = pl.lit(None, dtype=pl.String)
    for text, holds in reversed(reasons):
        reason = pl.when(holds).then(pl.lit(text)).otherwise(reason)
    return events.with_columns(reason.alias(REASON))


def refuse_milliseconds(events: pl.LazyFrame, config: PrepareConfig, source: str) -> None:
    """Refuse a log whose largest timestamp cannot be Unix seconds.

    Raises:
        SchemaError: it is above 10^11 under clock `unix`.
    """
    largest = events.select(pl.col("timestamp").max()).collect().item()
    if config.clock == "unix" and largest is not None and largest > MILLISECONDS:
        raise SchemaError(
            f"{source}: column {config.columns.timestamp!r}: expected Unix seconds, got {largest} (above 10^11: "
            "milliseconds?). Divide by 1,000, or say --clock relative."
        )


def refuse_nothing_left(num_events: int, source: str, dropped: dict[str, int]) -> None:
    """Refuse a log of which no event is left.

    Raises:
        DataError: with the counts of what was dropped and why.
    """
    if num_events == 0:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "the log has no rows"
        raise DataError(f"{source}: expected at least one event, none is left: {why}. Check the log and its mapping.")
