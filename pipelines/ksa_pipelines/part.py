"""Third pass: gathered buckets become parts of the data set, one row a user, in the one order."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from ksa_pipelines.arrow import find_texts, read_frame, take_rows, to_arrow, write_frame
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
from recsys_ksa.data.jagged_arrays import offsets_of, ragged_arange
from recsys_ksa.data.parts import part_name
from recsys_ksa.data.rows import DIGEST, rows_name, with_digests, write_rows
from recsys_ksa.order import TieKind
from recsys_ksa.schema import UNKNOWN_ITEM


@dataclass(frozen=True)
class PartTask:
    """Gathered buckets to write."""

    buckets: range
    numbered: tuple[int, ...]
    """Users that have a number already, by bucket, of all buckets."""
    folder: Path
    """Of what was gathered."""
    items: Path
    """Table of item_index and item_hash by code in the log."""
    event_types: tuple[tuple[str, int], ...] | None
    """Name and index by code in the log; None where it has none."""
    tie: TieKind
    split: Split
    directory: Path
    """The data set."""
    version: int
    """That is being made."""
    stored: Stored | None
    """Histories of these buckets that the data set has already."""


@dataclass(frozen=True)
class Written:
    """The part of a bucket."""

    bucket: int
    name: str
    sha256: str
    numbered: int
    """Users of the bucket that have a number now."""


def write_buckets(task: PartTask) -> list[Written]:
    """Write the parts of gathered buckets, and their rows."""
    events, users = _numbered(task, read_frame(task.folder / EVENTS), read_frame(task.folder / USERS))
    _, offsets = user_offsets(events["user"].to_numpy())
    ordered, ties = sort_by_order(_as_indices(task, events), task.tie)
    lists = {name: to_arrow(ordered[name]) for name in LISTS if name in ordered.columns} | {"tie": ties}
    row = users["row"].to_numpy()
    if task.stored is not None and (row != UNKNOWN).any():
        before, lengths = lists_of(task.stored.read(row[row != UNKNOWN])), users["num_events"].to_numpy()
        lists, offsets = insert_events(before[0], offsets_of(lengths), lists, offsets, task.tie)
    positions = split_positions(lists["timestamp"].to_numpy(), offsets, task.split)
    rows = with_digests(group_by_user(lists, users, positions, offsets))
    bucket = users["bucket"].to_numpy()
    ends = np.flatnonzero(np.diff(bucket, append=-1)) + 1
    return [_write_part(task, rows.slice(first, last - first)) for first, last in pairwise([0, *ends.tolist()])]


def _write_part(task: PartTask, rows: pa.Table) -> Written:
    """Write a bucket's part and rows."""
    n, bucket = divmod(rows.column("user_index")[-1].as_py(), len(task.numbered))
    name = part_name(task.version, bucket)
    target, beside = task.directory / name, task.directory / rows_name(name)
    write_part(rows.drop_columns(DIGEST), target, compact=task.stored is None)
    write_rows(rows, beside)
    begin_sync(beside)
    return Written(bucket, name, file_hash(target), max(task.numbered[bucket], n + 1))


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
    _write_log_items(catalogue, ingested, items, hashed=tie == "hash")
    for folder in ("histories", "cache"):
        (directory / folder).mkdir(exist_ok=True)
    now = list(numbered)
    tasks = [
        PartTask(
            buckets=gathered.buckets,
            numbered=tuple(numbered),
            folder=gathered.folder,
            items=items,
            event_types=_event_types(ingested, catalogue),
            tie=tie,
            split=split,
            directory=directory,
            version=version,
            stored=None if stored is None else stored.of(gathered.buckets),
        )
        for gathered in ingested.gathered
    ]
    files = dict[str, str]()
    for written in chain.from_iterable(engine.map(write_buckets, tasks)):
        now[written.bucket], files[written.name] = written.numbered, written.sha256
    return tuple(now), files


def _numbered(task: PartTask, events: pl.DataFrame, users: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the events and the users that have any, all with a number, by bucket and number.

    New users: bucket + num_buckets * n, n counting on by (first time, id bytes).
    """
    code, offsets = user_offsets(events["user"].to_numpy())
    users = take_rows(users, code)
    bucket, user_index = users["bucket"].to_numpy(), users["user_index"].to_numpy().copy()
    first_seen = events["timestamp"].to_numpy()[offsets[:-1]]
    by_id = users["user_id"].arg_sort().to_numpy()  # strings compare as their bytes
    by_time = by_id[np.lexsort((first_seen[by_id], bucket[by_id]))]
    new = by_time[user_index[by_time] == UNKNOWN]
    n = np.arange(len(new)) - np.searchsorted(bucket[new], bucket[new])
    user_index[new] = bucket[new] + len(task.numbered) * (np.array(task.numbered)[bucket[new]] + n)
    # As they were gathered, unless the first events of a user were dropped since.
    order, lengths = np.lexsort((user_index, bucket)), np.diff(offsets)
    if not np.array_equal(order, np.arange(len(order))):
        events = take_rows(events, ragged_arange(offsets[:-1][order], lengths[order]))
    events = events.with_columns(user=pl.Series(np.repeat(np.arange(len(order)), lengths[order])))
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


def _write_log_items(catalogue: Catalogue, ingested: Ingested, path: Path, *, hashed: bool) -> None:
    """Write the table of item_index and, if `hashed`, item_hash of a log's items, by their code there.

    An item that the catalogue does not have (a filter dropped its events) gets 0.
    """
    item_ids, item_index = ingested.names["item"].values, ingested.item_index.copy()
    new = np.flatnonzero(item_index == UNKNOWN_ITEM)
    if len(new):
        place = find_texts(to_arrow(catalogue.items["item_id"]), item_ids.gather(new))  # of each item_index
        met = np.flatnonzero(place >= 0)
        item_index[new[place[met]]] = met
    columns = [pl.Series("item_index", item_index)]
    write_frame(pl.DataFrame([*columns, *([item_hashes(item_ids)] if hashed else [])]), path)
