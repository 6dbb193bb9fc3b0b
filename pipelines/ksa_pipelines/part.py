"""Third pass: a gathered bucket becomes its part of the data set, one row a user, in the one order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ksa_pipelines.arrow import read_frame, read_table, write_frame
from ksa_pipelines.bucket import EVENTS, ITEMS, OLD, USERS
from ksa_pipelines.catalogue import Catalogue, Counted, log_items
from ksa_pipelines.engine import Engine
from ksa_pipelines.histories import as_events, group_by_user, user_offsets
from ksa_pipelines.ingest import Ingested
from ksa_pipelines.split import Split, split_positions
from ksa_pipelines.ties import sort_by_order
from ksa_pipelines.write import WORK, write_part
from recsys_ksa.data.parts import part_name
from recsys_ksa.order import TieKind


@dataclass(frozen=True)
class PartTask:
    """One gathered bucket to write."""

    bucket: int
    num_buckets: int
    numbered: int
    """Users of the bucket that have a number already."""
    folder: Path
    """Of the gathered bucket."""
    items: Path
    """Table of item_id, item_index and item_hash of all items of the log."""
    event_types: tuple[str | None, ...] | None
    """By index; None where the log has none."""
    tie: TieKind
    split: Split
    target: Path
    """The Parquet file to write."""


def write_bucket(task: PartTask) -> int:
    """Write the part of a bucket; return how many users of it have a number now."""
    events = read_frame(task.folder / EVENTS)
    users = number_users(task, events)
    new = sort_by_order(_as_numbers(task, events, users), task.tie)
    old = read_table(task.folder / OLD) if (task.folder / OLD).exists() else None
    ordered = new if old is None else merge_by_order(as_events(old), new)
    users = users.filter(pl.col("user_index").is_not_null()).sort("user_index")
    user_index, offsets = user_offsets(ordered)
    users = users.filter(pl.Series(np.isin(users["user_index"].to_numpy(), user_index)))
    positions = split_positions(ordered["timestamp"].to_numpy(), offsets, task.split)
    write_part(group_by_user(ordered, users.select("user_id", "user_index"), positions, offsets), task.target)
    return max(task.numbered, int(user_index.max()) // task.num_buckets + 1)


def write_parts(
    ingested: Ingested,
    counted: Counted,
    catalogue: Catalogue,
    tie: TieKind,
    split: Split,
    directory: Path,
    version: int,
    engine: Engine,
    numbered: Sequence[int],
) -> tuple[int, ...]:
    """Write a version's part of each gathered bucket into `directory`; return how many users each bucket numbers now.

    Args:
        ingested: the log.
        counted, catalogue: its items and event types, and their numbers.
        tie, split: of the data set.
        directory: the data set.
        version: that is being made.
        engine: where the work runs.
        numbered: users that have a number already, by bucket.
    """
    items = directory / WORK / "log_items.arrow"
    write_frame(log_items(catalogue, counted, hashed=tie == "hash"), items)
    now = list(numbered)
    tasks = [
        PartTask(
            bucket=gathered.bucket,
            num_buckets=len(numbered),
            numbered=numbered[gathered.bucket],
            folder=gathered.folder,
            items=items,
            event_types=catalogue.event_types(),
            tie=tie,
            split=split,
            target=directory / part_name(version, gathered.bucket),
        )
        for gathered in ingested.buckets
    ]
    for task, count in zip(tasks, engine.map(write_bucket, tasks)):
        now[task.bucket] = count
    return tuple(now)


def number_users(task: PartTask, events: pl.DataFrame) -> pl.DataFrame:
    """Return user_id and user_index by user code: bucket + num_buckets * n, n counting on by (first time, id bytes).

    A user without events keeps null.
    """
    users = read_frame(task.folder / USERS).with_row_index("user")
    users = users.with_columns(pl.col("user").cast(pl.Int32))
    if "user_index" not in users.columns:
        users = users.with_columns(user_index=pl.lit(None, dtype=pl.Int64))
    first = events.group_by("user").agg(pl.col("timestamp").min().alias("first_seen"))
    new = users.filter(pl.col("user_index").is_null()).join(first, on="user")
    new = new.sort("first_seen", pl.col("user_id").cast(pl.Binary))
    n = task.numbered + np.arange(new.height, dtype=np.int64)
    numbers = new.select("user", pl.Series("number", task.bucket + task.num_buckets * n))
    users = users.join(numbers, on="user", how="left", maintain_order="left")
    return users.select("user_id", pl.coalesce("user_index", "number").alias("user_index"))


def merge_by_order(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """Return old and new events in one order; equal keys as they were stored, then by arrival."""
    new = new.select(old.columns)
    is_before = pl.col("timestamp") < new["timestamp"].min()
    # Most of a history lies before a later log: only the rest is sorted. Both parts are in order already, so that
    # stable sorts keep equal keys as they are.
    rest = pl.concat([old.filter(~is_before), new]).sort("user_index", "timestamp", "tie", maintain_order=True)
    return pl.concat([old.filter(is_before), rest]).sort("user_index", maintain_order=True)


def _as_numbers(task: PartTask, events: pl.DataFrame, users: pl.DataFrame) -> pl.DataFrame:
    """Return the events with user_index, item_index and what ties need, in place of codes."""
    items = read_frame(task.folder / ITEMS, ["item_id"])
    items = items.join(read_frame(task.items), on="item_id", how="left", maintain_order="left")
    item = events["item"].to_numpy()
    taken = {"user_index": users["user_index"].gather(events["user"]), "item_index": items["item_index"].gather(item)}
    if task.tie == "hash":
        taken["item_hash"] = items["item_hash"].gather(item)
    events = events.drop("user", "item").with_columns(**taken)
    if task.event_types is None:
        return events
    indices = {name: index for index, name in enumerate(task.event_types) if name is not None}
    return events.rename({"event_type": "event_type_name"}).with_columns(
        pl.col("event_type_name").replace_strict(indices, default=0, return_dtype=pl.Int8).alias("event_type")
    )
