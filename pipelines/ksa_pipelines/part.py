"""Third pass: a gathered bucket becomes its part of the data set, one row a user, in the one order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ksa_pipelines.arrow import read_frame, take_rows, to_arrow, write_frame
from ksa_pipelines.bucket import EVENTS, USERS
from ksa_pipelines.catalogue import Catalogue
from ksa_pipelines.engine import Engine
from ksa_pipelines.histories import LISTS, group_by_user, lists_of, user_offsets
from ksa_pipelines.ingest import Ingested
from ksa_pipelines.insert import insert_events
from ksa_pipelines.split import Split, split_positions
from ksa_pipelines.stored import UNKNOWN, Stored
from ksa_pipelines.ties import sort_by_order
from ksa_pipelines.vocab import item_hashes
from ksa_pipelines.write import WORK, begin_sync, write_part
from recsys_ksa.data.hashes import file_hash
from recsys_ksa.data.jagged_arrays import ragged_arange
from recsys_ksa.data.parts import part_name
from recsys_ksa.data.rows import rows_name, write_rows
from recsys_ksa.order import TieKind
from recsys_ksa.schema import UNKNOWN_ITEM


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
    """Table of item_index and item_hash by code in the log."""
    event_types: tuple[tuple[str, int], ...] | None
    """Name and index by code in the log; None where it has none."""
    tie: TieKind
    split: Split
    directory: Path
    """The data set."""
    part: str
    """Name of the Parquet file to write."""
    stored: Stored | None
    """Histories that the data set has already."""


def write_bucket(task: PartTask) -> tuple[int, str]:
    """Write the part of a bucket and its rows; return how many users of it have a number now, and the part's sha256."""
    events, users = _numbered(task, read_frame(task.folder / EVENTS), read_frame(task.folder / USERS))
    user_index, offsets = user_offsets(events["user_index"].to_numpy())
    ordered, ties = sort_by_order(_as_indices(task, events), task.tie)
    lists = {name: to_arrow(ordered[name]) for name in LISTS if name in ordered.columns} | {"tie": ties}
    old = users["row"].to_numpy()
    old = old[old != UNKNOWN]
    if task.stored is not None and len(old):
        before, old_offsets = lists_of(task.stored.bucket(task.bucket).read(old))
        old_offsets = np.append(old_offsets, np.repeat(old_offsets[-1], users.height - len(old)))
        lists, offsets = insert_events(before, old_offsets, lists, offsets, task.tie)
    positions = split_positions(lists["timestamp"].to_numpy(), offsets, task.split)
    histories = group_by_user(lists, users, positions, offsets)
    target = task.directory / task.part
    write_part(histories, target, compact=task.stored is None)
    rows = task.directory / rows_name(task.part)
    write_rows(histories, rows)
    begin_sync(rows)
    return max(task.numbered, int(user_index[-1]) // task.num_buckets + 1), file_hash(target)


def write_parts(
    ingested: Ingested,
    catalogue: Catalogue,
    tie: TieKind,
    split: Split,
    directory: Path,
    version: int,
    engine: Engine,
    numbered: Sequence[int],
    stored: Stored | None = None,
) -> tuple[tuple[int, ...], dict[str, str]]:
    """Write a version's part of each gathered bucket into `directory`, and its rows.

    Args:
        ingested: the log.
        catalogue: the numbers of its items and event types.
        tie, split: of the data set.
        directory: the data set.
        version: that is being made.
        engine: where the work runs.
        numbered: users that have a number already, by bucket.
        stored: histories that the data set has already.

    Returns:
        How many users each bucket numbers now; the sha256 of each part.
    """
    items = directory / WORK / "log_items.arrow"
    _write_log_items(catalogue, ingested.names["item"].values, items, hashed=tie == "hash")
    now = list(numbered)
    tasks = [
        PartTask(
            bucket=gathered.bucket,
            num_buckets=len(numbered),
            numbered=numbered[gathered.bucket],
            folder=gathered.folder,
            items=items,
            event_types=_event_types(ingested, catalogue),
            tie=tie,
            split=split,
            directory=directory,
            part=part_name(version, gathered.bucket),
            stored=stored,
        )
        for gathered in ingested.buckets
    ]
    files = dict[str, str]()
    for task, (count, digest) in zip(tasks, engine.map(write_bucket, tasks)):
        now[task.bucket], files[task.part] = count, digest
    return tuple(now), files


def _numbered(task: PartTask, events: pl.DataFrame, users: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the events by user_index, in place of user, and the users that have any, by user_index.

    New users: bucket + num_buckets * n, n counting on by (first time, id bytes).
    """
    code, offsets = user_offsets(events["user"].to_numpy())
    users = take_rows(users, code)
    first_seen, user_index = events["timestamp"].to_numpy()[offsets[:-1]], users["user_index"].to_numpy().copy()
    by_id = users["user_id"].arg_sort().to_numpy()  # strings compare as their bytes
    by_time = by_id[np.argsort(first_seen[by_id], kind="stable")]
    new = by_time[user_index[by_time] == UNKNOWN]
    user_index[new] = task.bucket + task.num_buckets * (task.numbered + np.arange(len(new)))
    # As they were gathered, unless the first events of a user were dropped since.
    order = np.argsort(user_index, kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        events = take_rows(events, ragged_arange(offsets[:-1][order], np.diff(offsets)[order]))
    lengths = np.diff(offsets)[order]
    events = events.with_columns(user_index=pl.Series(np.repeat(user_index[order], lengths))).drop("user")
    return events, take_rows(users.with_columns(user_index=pl.Series(user_index)), order)


def _as_indices(task: PartTask, events: pl.DataFrame) -> pl.DataFrame:
    """Return the events with item_index, event_type (index) and what ties need, in place of the log's codes."""
    item = events["item"].to_numpy()
    items = read_frame(task.items)
    columns = {name: pl.Series(items[name].to_numpy()[item]) for name in items.columns}
    if task.event_types is not None:
        code = events["event_type"].to_numpy()
        indices = np.array([*(index for _, index in task.event_types), 0], dtype=np.int8)
        columns["event_type"] = pl.Series(indices[code])
        if task.tie == "hash":
            names = pl.Series([*(name for name, _ in task.event_types), None], dtype=pl.String)
            columns["event_type_name"] = names.gather(np.where(code < 0, len(names) - 1, code))
    return events.drop("item").with_columns(**columns)


def _event_types(ingested: Ingested, catalogue: Catalogue) -> tuple[tuple[str, int], ...] | None:
    if not ingested.has_event_type:
        return None
    indices = {name: index for index, name in enumerate(catalogue.event_types() or ()) if name is not None}
    return tuple((name, indices.get(name, 0)) for name in ingested.names["event_type"].values)


def _write_log_items(catalogue: Catalogue, item_ids: pl.Series, path: Path, *, hashed: bool) -> None:
    """Write the table of item_index and, if `hashed`, item_hash of a log's items, by their code there.

    An item that the catalogue does not have (a filter dropped its events) gets 0.
    """
    known = catalogue.items.select(pl.col("item_id").alias("name"), "item_index").drop_nulls()
    items = pl.DataFrame({"name": item_ids}).join(known, on="name", how="left", maintain_order="left")
    columns = [items["item_index"].fill_null(UNKNOWN_ITEM)]
    write_frame(pl.DataFrame([*columns, *([item_hashes(item_ids)] if hashed else [])]), path)
