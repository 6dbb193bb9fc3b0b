"""What `ksa prepare` tells while it works: one line a step."""

from collections.abc import Callable

import polars as pl

Report = Callable[[str], None]
"""Told what a step did, in one line."""


def tally(reasons: pl.Series) -> dict[str, int]:
    """Count each value of a column of reasons, nulls (nothing happened) left out, by name."""
    counts = reasons.drop_nulls().value_counts().sort(reasons.name)
    return {str(reason): int(count) for reason, count in counts.iter_rows()}


def listed(what: str, counts: dict[str, int]) -> str:
    """Return `; what: 3 this, 4 that` for the counts above 0, or nothing."""
    parts = [f"{count:,} {reason}" for reason, count in counts.items() if count]
    return f"; {what}: {', '.join(parts)}" if parts else ""
