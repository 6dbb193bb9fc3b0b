"""Second pass: the events of one bucket of a log, as numbers, audited, without those that are there twice.

A bucket is small enough to hold, and buckets know nothing of each other: they can be worked on anywhere. What is
gathered lies in the bucket's folder until the third pass (`part.py`) has the vocabularies of all buckets:

    events.arrow   user, item (rows of the two below), timestamp, arrival; event_type, event_id where the log has them
    users.arrow    user_id, and user_index where the data set knows the user
    items.arrow    item_id, and item_index where the data set knows the item; count and first_seen in this bucket
    old.arrow      the histories of these users that the data set already has
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from ksa_pipelines.arrow import encode, read_frame, write_frame, write_table
from ksa_pipelines.clean import drop_duplicates
from ksa_pipelines.histories import as_events
from ksa_pipelines.spill import read_bucket
from ksa_pipelines.ties import TiedPairs, count_tied_pairs, sort_by_time
from recsys_ksa.data.parts import newest_rows

EVENTS, USERS, ITEMS, OLD = "events.arrow", "users.arrow", "items.arrow", "old.arrow"


@dataclass(frozen=True)
class Known:
    """What a data set already knows, where a log is appended."""

    dataset: Path
    parts: dict[int, tuple[str, ...]]
    """Names of each bucket's parts, oldest first."""
    items: Path
    """Table of item_id and item_index."""
    event_types: tuple[str | None, ...]
    """By index."""
    columns: frozenset[str]
    """Of the optional ones, event_type and event_id, those it has."""


@dataclass(frozen=True)
class GatherTask:
    """One bucket of a log."""

    bucket: int
    folder: Path
    """Of this bucket, to work in."""
    chunks: tuple[tuple[Path, int], ...]
    """Spilled chunks, each with the arrival number of its file's first row."""
    known: Known | None = None


@dataclass(frozen=True)
class Gathered:
    """What a bucket of a log holds."""

    bucket: int
    folder: Path
    num_events: int
    last_timestamp: int
    tied: TiedPairs
    duplicates: dict[str, int]
    event_types: dict[str, int]
    """Events by type."""
    untyped: int
    """Events without a type."""


def gather(task: GatherTask) -> Gathered | None:
    """Gather a bucket into `task.folder`; None where the log has no event of it."""
    rows = read_bucket(task.chunks, task.bucket)
    if rows.is_empty():
        return None
    task.folder.mkdir(parents=True, exist_ok=True)
    user, users = encode(rows["user_id"])
    item, items = encode(rows["item_id"])
    codes = {"user": pl.Series(user, dtype=pl.Int32), "item": pl.Series(item, dtype=pl.Int32)}
    events = sort_by_time(rows.drop("user_id", "item_id").with_columns(**codes))
    del rows, user, item
    tied = count_tied_pairs(events, items)

    user_table, item_table = pl.DataFrame({"user_id": users}), pl.DataFrame({"item_id": items})
    old = None
    if task.known is not None:
        user_table, item_table, histories = _recognise(task.known, task.bucket, user_table, item_table)
        if histories is not None:
            write_table(histories, task.folder / OLD)
            old = _as_events(histories, events, user_table, item_table, task.known.event_types)
    events, duplicates = drop_duplicates(events, old)
    write_frame(user_table, task.folder / USERS)
    write_frame(item_table, task.folder / ITEMS)
    return _settle(task.bucket, task.folder, events, tied, duplicates)


def keep_items(gathered: Gathered, kept: set[str] | None, min_user_events: int) -> tuple[Gathered | None, int, int]:
    """Drop events of other items than `kept`, then of users with fewer than `min_user_events`.

    Args:
        gathered: the bucket.
        kept: item ids; None keeps all.
        min_user_events: smallest number of events a user may have.

    Returns:
        The bucket, None if no event is left; events dropped for their item; events dropped for their user.
    """
    events = read_frame(gathered.folder / EVENTS)
    frequent = events
    if kept is not None:
        items = read_frame(gathered.folder / ITEMS, ["item_id"])["item_id"]
        wanted = np.fromiter((item in kept for item in items), dtype=bool, count=len(items))
        frequent = events.filter(pl.Series(wanted[events["item"].to_numpy()]))
    active = frequent.filter(pl.len().over("user") >= min_user_events)
    dropped = events.height - frequent.height, frequent.height - active.height
    if active.is_empty():
        return None, *dropped
    # A folder of its own: a task that was killed runs again, from what was there before.
    folder = gathered.folder / "kept"
    folder.mkdir(exist_ok=True)
    for name in (USERS, ITEMS):
        shutil.copyfile(gathered.folder / name, folder / name)
    return _settle(gathered.bucket, folder, active, gathered.tied, gathered.duplicates), *dropped


def item_counts(folder: Path) -> pl.DataFrame:
    """Return item_id, count and first_seen of a gathered bucket's items, without those that have no event."""
    return read_frame(folder / ITEMS).select("item_id", "count", "first_seen").filter(pl.col("count") > 0)


def _settle(bucket: int, folder: Path, events: pl.DataFrame, tied: TiedPairs, duplicates: dict[str, int]) -> Gathered:
    """Write the events and what they count."""
    item, timestamp = events["item"].to_numpy(), events["timestamp"].to_numpy()
    items = read_frame(folder / ITEMS)
    first_seen = np.full(items.height, np.iinfo(np.int64).max)  # of items without an event; never read
    np.minimum.at(first_seen, item, timestamp)
    counts = np.bincount(item, minlength=items.height)
    items = items.with_columns(count=pl.Series(counts, dtype=pl.Int64), first_seen=pl.Series(first_seen))
    write_frame(items, folder / ITEMS)
    write_frame(events, folder / EVENTS)
    types = events["event_type"].value_counts() if "event_type" in events.columns else pl.DataFrame()
    by_type = {name: int(count) for name, count in types.iter_rows()}
    return Gathered(
        bucket=bucket,
        folder=folder,
        num_events=events.height,
        last_timestamp=int(timestamp.max(initial=0)),
        tied=tied,
        duplicates=duplicates,
        event_types={name: count for name, count in by_type.items() if name is not None},
        untyped=by_type.get(None, 0),
    )


def _recognise(
    known: Known, bucket: int, users: pl.DataFrame, items: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame, pa.Table | None]:
    """Add user_index and item_index where the data set has them; return the users' histories with them."""
    histories = newest_rows(known.dataset, known.parts.get(bucket, ()), users["user_id"].to_list())
    items = items.join(read_frame(known.items), on="item_id", how="left", maintain_order="left")
    if histories is not None:
        ids = pl.DataFrame(histories.select(["user_id", "user_index"]))
        users = users.join(ids, on="user_id", how="left", maintain_order="left")
    return users, items, histories


def _as_events(
    histories: pa.Table,
    new: pl.DataFrame,
    users: pl.DataFrame,
    items: pl.DataFrame,
    event_types: tuple[str | None, ...],
) -> pl.DataFrame:
    """Return what of old histories could be the same as a new event, in the codes of the new ones.

    An item that the log does not have is null.
    """
    code = pl.DataFrame({"user_index": users["user_index"], "user": np.arange(users.height, dtype=np.int32)})
    item = pl.DataFrame({"item_index": items["item_index"], "item": np.arange(items.height, dtype=np.int32)})
    same = pl.col("timestamp").is_between(new["timestamp"].min(), new["timestamp"].max())
    if "event_id" in new.columns:
        same = pl.col("event_id").is_in(new["event_id"].drop_nulls().unique().implode()) | same
    events = as_events(histories.drop_columns("tie")).filter(same)
    events = events.join(code, on="user_index", how="left", maintain_order="left")
    events = events.join(item.drop_nulls(), on="item_index", how="left", maintain_order="left")
    if "event_type" in events.columns:
        names = pl.Series(event_types, dtype=pl.String)
        events = events.with_columns(event_type=names[events["event_type"].cast(pl.Int64)])
    return events.drop("user_index", "item_index")
