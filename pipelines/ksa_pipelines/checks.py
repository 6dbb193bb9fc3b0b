"""Which rows of a log are no events, and why."""

import hashlib

import polars as pl

from ksa_pipelines.config import PrepareConfig
from recsys_ksa.data.manifest import Forgotten
from recsys_ksa.errors import DataError, SchemaError

REASON = "reason"
MILLISECONDS = 100_000_000_000
"""Unix seconds of the year 5138: a larger timestamp is in milliseconds or finer."""
MAX_ID_BYTES = 1_024
"""UTF-8 bytes of a user, item or event id, or of an event type."""
FORGOTTEN = "forgotten user"


def mark_rejected(events: pl.LazyFrame, config: PrepareConfig, forgotten: Forgotten | None = None) -> pl.LazyFrame:
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
    there = events.collect_schema().names()
    for name in ("user_id", "item_id", "event_type", "event_id"):
        if name in there:
            reasons.append((f"{name} over {MAX_ID_BYTES:,} bytes", pl.col(name).str.len_bytes() > MAX_ID_BYTES))
    if forgotten is not None:
        reasons.append((FORGOTTEN, is_forgotten(forgotten)))
    reason = pl.lit(None, dtype=pl.String)
    for text, holds in reversed(reasons):
        reason = pl.when(holds).then(pl.lit(text)).otherwise(reason)
    return events.with_columns(reason.alias(REASON))


def forgotten_hash(salt: str, user_id: str) -> str:
    """Return how a forgotten user is written down: SHA-256 of salt and id, in hexadecimal."""
    return hashlib.sha256(bytes.fromhex(salt) + user_id.encode()).hexdigest()


def is_forgotten(forgotten: Forgotten) -> pl.Expr:
    """Return whether each user_id is one that was forgotten."""
    blocked = set(forgotten.users)

    def check(user_id: pl.Series) -> pl.Series:
        distinct = user_id.unique().drop_nulls()
        met = [user for user in distinct if forgotten_hash(forgotten.salt, user) in blocked]
        return user_id.is_in(met)

    return pl.col("user_id").map_batches(check, return_dtype=pl.Boolean, is_elementwise=True)


def refuse_milliseconds(events: pl.DataFrame, config: PrepareConfig, source: str) -> None:
    """Refuse a log whose largest timestamp cannot be Unix seconds.

    Raises:
        SchemaError: it is above 10^11 under clock `unix`.
    """
    largest = events["timestamp"].max()
    if config.clock == "unix" and isinstance(largest, int) and largest > MILLISECONDS:
        raise SchemaError(
            f"{source}: column {config.columns.timestamp!r}: expected Unix seconds, got {largest} (above 10^11: "
            "milliseconds?). Say time_unit = 'ms' under [read] of a prepare file, or --clock relative."
        )


class NothingLeftError(DataError):
    """No event of a log is left."""

    def __init__(self, source: str, why: str) -> None:
        super().__init__(f"{source}: expected at least one event, none is left: {why}. Check the log and its mapping.")
        self.why = why
        """What was dropped, counted by reason."""


def refuse_nothing_left(num_events: int, source: str, dropped: dict[str, int]) -> None:
    """Refuse a log of which no event is left.

    Raises:
        NothingLeftError: with the counts of what was dropped and why.
    """
    if num_events == 0:
        why = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
        raise NothingLeftError(source, why or "the log has no rows")
