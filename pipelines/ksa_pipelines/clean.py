"""Dropping events that are there twice."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ksa_pipelines.arrow import take_rows
from ksa_pipelines.insert import find_times
from ksa_pipelines.report import tally
from recsys_ksa.data.jagged_arrays import ragged_arange

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
        events: user, item, timestamp, arrival and, where the log has them, event_type (-1: none) and event_id; by
            user, time and arrival.
        old: the same without arrival, in the data set already; by user and time.
    """
    if "event_id" in events.columns:
        marks = _marks(events, old)
        repeats, counts = np.flatnonzero(marks.is_not_null().to_numpy()), tally(marks)
    else:
        repeats = _repeats(events)
        if old is not None:
            repeats = np.union1d(repeats, _known(events, old))
        counts = {SAME_EVENT: len(repeats)}
    if not len(repeats):
        return events, {}
    kept = np.ones(events.height, dtype=bool)
    kept[repeats] = False
    return take_rows(events, np.flatnonzero(kept)), counts


def _marks(events: pl.DataFrame, old: pl.DataFrame | None) -> pl.Series:
    """[events] null for an event, else the rule by which an earlier one was the same; for logs with event ids."""
    columns = [name for name in _COLUMNS if name in events.columns]
    rows = events.select(*columns, pl.col("arrival").cast(pl.Int64).alias(_ORDER))
    if old is not None:
        before = old.select(*columns, pl.lit(-1, dtype=pl.Int64).alias(_ORDER))
        rows = pl.concat([before, rows])
    payload = [name for name in ("item", "timestamp", "event_type") if name in columns]
    first = pl.col(_ORDER) > pl.col(_ORDER).min().over("user", "event_id")
    same = pl.struct(payload)
    other = same != same.sort_by(_ORDER).first().over("user", "event_id")
    by_id = pl.when(first & other).then(pl.lit(SAME_ID_OTHER_PAYLOAD)).when(first).then(pl.lit(SAME_ID))
    without_id = pl.col(_ORDER) > pl.col(_ORDER).min().over("user", *payload, pl.col("event_id").is_null())
    mark = pl.when(pl.col("event_id").is_null()).then(pl.when(without_id).then(pl.lit(SAME_EVENT))).otherwise(by_id)
    return rows.select(mark.alias(DUPLICATE)).to_series().tail(events.height)


def _repeats(events: pl.DataFrame) -> NDArray[np.int64]:
    """Return the rows that are the same as an earlier one by user, item, time and type.

    Only events of one user and time can be.
    """
    user, timestamp = events["user"].to_numpy(), events["timestamp"].to_numpy()
    tied = np.append(False, (user[1:] == user[:-1]) & (timestamp[1:] == timestamp[:-1]))
    suspects = np.flatnonzero(tied | np.append(tied[1:], False))
    item = events["item"].to_numpy()[suspects].astype(np.int64)
    key = np.cumsum(~tied)[suspects] * (item.max(initial=0) + 1) + item
    if "event_type" in events.columns:
        kind = events["event_type"].to_numpy()
        key = key * (int(kind.max(initial=0)) + 2) + kind[suspects] + 1
    order = np.argsort(key, kind="stable")  # nearly in order, so that this is quicker than hashing
    key = key[order]
    return np.sort(suspects[order[1:][key[1:] == key[:-1]]])


def _known(events: pl.DataFrame, old: pl.DataFrame) -> NDArray[np.int64]:
    """Return the rows that are the same as an old event by user, item, time and type."""
    columns = [name for name in _COLUMNS if name in events.columns]
    new_times, old_times = ((each["user"].to_numpy(), each["timestamp"].to_numpy()) for each in (events, old))
    begins, ends = find_times(*old_times, *new_times)
    rows = np.flatnonzero(begins < ends)
    if not len(rows):
        return rows
    there = np.unique(ragged_arange(begins[rows], (ends - begins)[rows]))
    new = take_rows(events.select(columns), rows).with_columns(row=pl.Series(rows))
    return new.join(take_rows(old.select(columns), there), on=columns, how="semi")["row"].to_numpy()
