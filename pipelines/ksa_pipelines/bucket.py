"""Second pass: events of some buckets of a log, in order of time, audited, without those that are there twice.

A bucket is small enough to hold, and buckets know nothing of each other: they can be worked on anywhere. Small ones are
worked on together with their neighbours. What is gathered lies in a folder until the third pass (`part.py`) has the
vocabularies of all buckets:

    events.arrow   user (row of users.arrow), item (code in the log), timestamp, arrival; event_type (code; -1: none),
                   event_id where the log has them; by user, time and arrival
    users.arrow    user_id, bucket, and of the data set user_index, row and num_events (`Stored.recognise`); by bucket
    items.arrow    item (code), count and first_seen in these buckets
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ksa_pipelines.arrow import read_frame, take_rows, write_frame
from ksa_pipelines.clean import drop_duplicates
from ksa_pipelines.known import Known
from ksa_pipelines.names import Names
from ksa_pipelines.spill import Chunk, read_rows, read_users
from ksa_pipelines.stored import UNKNOWN, Stored
from ksa_pipelines.ties import TiedPairs, count_tied_pairs, order_by_time

EVENTS, USERS, ITEMS = "events.arrow", "users.arrow", "items.arrow"


@dataclass(frozen=True)
class GatherTask:
    """Neighbouring buckets of a log."""

    buckets: range
    most_events: int
    """To be held at a time, of the log and of the same users in the data set; of one bucket there can be more."""
    folder: Path
    """To work in, of the log."""
    chunks: tuple[Chunk, ...]
    names: dict[str, Names]
    """Of the number columns."""
    audit_ranks: Path
    """int64: what the audit compares, by code of the item."""
    stored: Stored
    """Histories of these buckets."""
    known: Known | None = None

    def of(self, buckets: range) -> "GatherTask":
        """Return the part of the task that is about some of its buckets."""
        return replace(self, buckets=buckets, stored=self.stored.of(buckets))


@dataclass(frozen=True)
class Gathered:
    """What neighbouring buckets of a log hold."""

    buckets: range
    folder: Path
    num_events: int
    last_timestamp: int
    tied: TiedPairs
    duplicates: dict[str, int]
    event_types: NDArray[np.int64] | None
    """Events without a type, then of each type by code; None where the log has none."""


def neighbours(num_events: NDArray[np.int64], most: int, first: int = 0) -> Iterator[range]:
    """Yield all buckets from `first` on, together as long as they have no more than `most` events."""
    begin, held = first, 0
    for bucket, count in enumerate(num_events.tolist(), first):
        if bucket > begin and held + count > most:
            yield range(begin, bucket)
            begin, held = bucket, 0
        held += count
    yield range(begin, first + len(num_events))


def gather(task: GatherTask) -> list[Gathered]:
    """Gather the buckets that the log has events of, together where they are small enough."""
    users, user_rows = read_users(task.chunks, task.buckets)
    if users.is_empty():
        return []
    users = task.stored.recognise(users)
    old_events = np.zeros(len(task.buckets), dtype=np.int64)
    np.add.at(old_events, users["bucket"].to_numpy() - task.buckets.start, users["num_events"].to_numpy())
    new_events = sum(np.diff(chunk.row_ends[task.buckets.start : task.buckets.stop + 1]) for chunk in task.chunks)
    smaller = [*neighbours(old_events + new_events, task.most_events, task.buckets.start)]
    if len(smaller) > 1:
        return [gathered for buckets in smaller for gathered in gather(task.of(buckets))]
    codes = {column: names.of_chunks() for column, names in task.names.items()}
    events, users = _in_order(read_rows(task.chunks, codes, user_rows, task.buckets), users)
    tied = count_tied_pairs(events, np.asarray(np.memmap(task.audit_ranks, dtype=np.int64, mode="r")))
    old = None if task.known is None else _old_events(task.known, task.stored, users, events)
    events, duplicates = drop_duplicates(events, old)
    folder = task.folder / f"bucket-{task.buckets.start:05d}"
    folder.mkdir(exist_ok=True)
    write_frame(users, folder / USERS)
    types = task.names.get("event_type")
    num_names = task.names["item"].count, None if types is None else types.count
    return [_settle(task.buckets, folder, events, tied, duplicates, num_names)]


def keep_items(
    gathered: Gathered, kept: NDArray[np.bool_] | None, min_user_events: int, num_items: int
) -> tuple[Gathered | None, int, int]:
    """Drop events of other items than `kept`, then of users with fewer than `min_user_events`.

    Args:
        gathered: the buckets.
        kept: by code of the item; None keeps all.
        min_user_events: smallest number of events a user may have.
        num_items: of the log.

    Returns:
        The buckets, None if no event is left; events dropped for their item; events dropped for their user.
    """
    events = read_frame(gathered.folder / EVENTS)
    frequent = events if kept is None else events.filter(pl.Series(kept[events["item"].to_numpy()]))
    lengths = np.bincount(frequent["user"].to_numpy(), minlength=1)
    active = frequent.filter(pl.Series(lengths[frequent["user"].to_numpy()] >= min_user_events))
    dropped = events.height - frequent.height, frequent.height - active.height
    if active.is_empty():
        return None, *dropped
    # A folder of its own: a task that was killed runs again, from what was there before.
    folder = gathered.folder / "kept"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(gathered.folder / USERS, folder / USERS)
    num_names = num_items, None if gathered.event_types is None else len(gathered.event_types) - 1
    return _settle(gathered.buckets, folder, active, gathered.tied, gathered.duplicates, num_names), *dropped


def item_counts(folder: Path) -> pl.DataFrame:
    """Return item, count and first_seen of the items that were gathered."""
    return read_frame(folder / ITEMS)


def _in_order(events: pl.DataFrame, users: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return events by user, time and arrival, and users as they will be numbered if no event is dropped.

    That is: by bucket; known ones by user_index, then by (first time, id bytes).
    """
    user, timestamp = events["user"].to_numpy(), events["timestamp"].to_numpy()
    first_seen = np.full(users.height, np.iinfo(np.int64).max)
    np.minimum.at(first_seen, user, timestamp)
    bucket, user_index = users["bucket"].to_numpy(), users["user_index"].to_numpy()
    by_id = users["user_id"].arg_sort().to_numpy()  # strings compare as their bytes
    keys = first_seen, user_index, user_index == UNKNOWN, bucket
    order = by_id[np.lexsort([key[by_id] for key in keys])]
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order))
    user = place[user]
    events = take_rows(events.with_columns(user=pl.Series(user)), order_by_time(user, timestamp))
    return events, take_rows(users, order)


def _settle(
    buckets: range,
    folder: Path,
    events: pl.DataFrame,
    tied: TiedPairs,
    duplicates: dict[str, int],
    num_names: tuple[int, int | None],
) -> Gathered:
    """Write the events and what they count; `num_names`: items and event types of the log."""
    num_items, num_types = num_names
    item, timestamp = events["item"].to_numpy(), events["timestamp"].to_numpy()
    first_seen = np.full(num_items, np.iinfo(np.int64).max)
    np.minimum.at(first_seen, item, timestamp)
    count = np.bincount(item, minlength=num_items)
    there = np.flatnonzero(count)
    write_frame(pl.DataFrame({"item": there, "count": count[there], "first_seen": first_seen[there]}), folder / ITEMS)
    write_frame(events, folder / EVENTS)
    types = None
    if num_types is not None:
        types = np.bincount(events["event_type"].to_numpy() + 1, minlength=num_types + 1)
    return Gathered(buckets, folder, events.height, int(timestamp.max(initial=0)), tied, duplicates, types)


def _old_events(known: Known, stored: Stored, users: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame | None:
    """Return what the data set has of these users and could be the same as a new event, in the codes of the log."""
    row = users["row"].to_numpy()
    met = np.flatnonzero(row != UNKNOWN)
    if "event_id" not in new.columns:  # then only events of one time can be the same, and most histories ended before
        met = met[stored.last_times(row[met]) >= new["timestamp"].to_numpy().min()]
    if not len(met):
        return None
    names = ["item_index", "timestamp", *(name for name in ("event_type", "event_id") if name in new.columns)]
    old, offsets = stored.events(row[met], names)
    item_codes = np.asarray(np.memmap(known.item_codes, dtype=np.int32, mode="r"))
    columns = {
        "user": np.repeat(met.astype(np.int32), np.diff(offsets)),
        "item": item_codes.take(old["item_index"].to_numpy()),
        "timestamp": old["timestamp"].to_numpy(),
    }
    if known.event_types is not None:
        columns["event_type"] = np.array(known.event_types, dtype=np.int32)[old["event_type"].to_numpy()]
    if "event_id" in new.columns:
        columns["event_id"] = pl.Series(old["event_id"])
    return pl.DataFrame(columns)
