"""Removing users from a data set for good: their rows, what only they met, and every earlier version.

What stays is what a replay without their rows would give, with the numbering as it was. They are written down as
salted hashes, so that a later log cannot bring them back.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.catalogue import Catalogue, read_catalogue, write_catalogue
from ksa_pipelines.change import changing
from ksa_pipelines.checks import forgotten_hash
from ksa_pipelines.compact import merge_parts
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.report import Report
from ksa_pipelines.split import global_cuts
from ksa_pipelines.users import read_users, without_others, write_users
from ksa_pipelines.vocab import user_bucket
from ksa_pipelines.write import hash_files
from recsys_ksa.config_files import parse_config
from recsys_ksa.data.manifest import Counts, Forgotten, Manifest, versioned
from recsys_ksa.data.parts import Part, all_parts, blocks, checked_parts, part_name, parts_by_bucket
from recsys_ksa.data.rows import Overview, numbered_users, open_rows
from recsys_ksa.errors import DataError
from recsys_ksa.progress import progress
from recsys_ksa.schema import indices_column


def forget(dataset: Path, user_ids: Sequence[str], report: Report) -> Manifest:
    """Remove users from every part, table and earlier version; return the manifest of the new version.

    Items, event types and categories that nobody else has keep their number and lose their name. Users that the
    data set does not have are blocked all the same.

    Raises:
        DataError: it is no data set, no user would be left, or it is being changed by another process.
    """
    with changing(dataset) as change:
        before = change.before
        checked_parts(dataset, before)
        files, absent = dict(before.files), set(user_ids)
        for bucket, names in progress(parts_by_bucket(files).items(), "removing", unit="bucket"):
            ids = [user for user in user_ids if user_bucket(user, before.num_buckets) == bucket]
            there = _there(dataset, names, ids) if ids else set()
            absent -= there
            if there:
                files = {name: digest for name, digest in files.items() if name not in names}
                target = dataset / part_name(change.version, bucket)
                if merge_parts(dataset, names, target, before.split, lambda block, ids=ids: _without(block, ids)):
                    files |= hash_files(dataset, [target])
        seen = _look(all_parts(dataset, files), before, dataset)
        report(f"removed {before.counts.users - seen.users:,} users with {before.counts.events - seen.events:,} events")
        if absent:
            report(f"not in the data set, refused in later logs all the same: {', '.join(sorted(absent))}")

        catalogue = _blank(read_catalogue(dataset, before), seen)
        write_catalogue(catalogue, dataset, change.version)
        files = {name: digest for name, digest in files.items() if name not in map(before.table_file, before.tables)}
        written = [dataset / versioned(name, change.version) for name in before.item_tables]
        for name in [name for name in files if name.startswith("quarantine/")]:
            written += _rewrite_quarantine(dataset, name, set(user_ids), change.version)
            del files[name]

        config = parse_config(PrepareConfig, before.config, str(dataset))
        split = global_cuts(config.split, config.clock, seen.last_timestamp)
        rows = open_rows(dataset, files)
        overview = Overview.of(rows, split)
        user_table = without_others(read_users(dataset, before), numbered_users(rows))
        files |= hash_files(dataset, written + write_users(user_table, dataset, change.version))
        after = before.model_copy(
            update={
                "version": change.version,
                "tables_version": change.version,
                "content_hash": overview.content_hash,
                "split_hash": overview.split_hash,
                "counts": Counts.of(overview.lengths, catalogue.num_items),
                "split": split,
                "users_described": user_table.rows.height,
                "forgotten": _blocked(before.forgotten, user_ids),
                "files": dict(sorted(files.items())),
            }
        )
        change.publish(after, keep_earlier=False)
    report(f"{dataset}: version {after.version}; earlier versions are gone")
    return after


@dataclass(frozen=True)
class Seen:
    """What is left, counted over all events."""

    users: int
    events: int
    last_timestamp: int
    count: NDArray[np.int64]
    """Events of each item, by item_index."""
    first_seen: NDArray[np.int64]
    event_types: NDArray[np.int64]
    """Events of each type, by index."""


def _look(parts: Sequence[Part], manifest: Manifest, dataset: Path) -> Seen:
    rows = manifest.counts.items + 1
    count, first_seen = np.zeros(rows, dtype=np.int64), np.full(rows, np.iinfo(np.int64).max)
    event_types, users, last = np.zeros(128, dtype=np.int64), 0, 0
    for block in blocks(parts):
        item, timestamp = (_values(block, name) for name in ("item_index", "timestamp"))
        count += np.bincount(item, minlength=rows)
        np.minimum.at(first_seen, item, timestamp)
        if manifest.has_event_type:
            event_types += np.bincount(_values(block, "event_type"), minlength=128)
        users, last = users + block.num_rows, max(last, int(timestamp.max()))
    if users == 0:
        raise DataError(f"{dataset}: expected that some user stays, nobody would. Delete the data set.")
    return Seen(users, int(count.sum()), last, count, first_seen, event_types)


def _values(block: pa.Table, name: str) -> NDArray:
    return block.column(name).combine_chunks().flatten().to_numpy()


def _blank(catalogue: Catalogue, seen: Seen) -> Catalogue:
    """Return the catalogue with what is left counted, and without the names of what nobody has any more."""
    index = catalogue.items["item_index"].to_numpy()
    there = pl.Series(seen.count[index] > 0)
    left = pl.when(there)
    sides = [name for name in catalogue.items.columns if name.endswith("_index") and name != "item_index"]
    lists = [name for name in catalogue.items.columns if name.endswith(("_indices", "_vector"))]
    columns = [
        left.then("item_id").alias("item_id"),
        pl.Series("count", seen.count[index]),
        left.then(pl.Series(seen.first_seen[index])).alias("first_seen"),
        *(left.then(name).otherwise(0).cast(pl.Int32).alias(name) for name in sides),
        *(left.then(name).otherwise(pl.col(name).first()).alias(name) for name in lists),
    ]
    if "title" in catalogue.items.columns:
        columns.append(left.then("title").alias("title"))
    items = catalogue.items.with_columns(columns)
    vocab = {}
    for name, table in catalogue.vocab.items():
        if name == "event_type":
            counts = seen.event_types
        elif f"{name}_index" in items.columns:
            counts = np.bincount(items.filter(there)[f"{name}_index"].to_numpy(), minlength=table.height)
        else:
            met = items.filter(there)[indices_column(name)].explode().drop_nulls()
            counts = np.bincount(met.to_numpy(), minlength=table.height)
        count = pl.Series("count", counts[: table.height].astype(np.int64))
        vocab[name] = table.with_columns(count, pl.when(count > 0).then("value").alias("value"))
    return Catalogue(items, vocab, catalogue.items_files, catalogue.items_described)


def _there(dataset: Path, names: Sequence[str], user_ids: Sequence[str]) -> set[str]:
    """Return which of the users some part has."""
    columns = (pl.Series(pq.read_table(dataset / name, columns=["user_id"]).column(0)) for name in names)
    return {user for column in columns for user in column.filter(column.is_in(list(user_ids)))}


def _without(block: pa.Table, user_ids: Sequence[str]) -> pa.Table:
    gone = pl.Series(block.column("user_id")).is_in(list(user_ids)).to_numpy()
    return block.filter(pa.array(~gone))


def _rewrite_quarantine(dataset: Path, name: str, user_ids: set[str], version: int) -> list[Path]:
    """Write a log's rejected rows without those of the users; return the file, or nothing where no row is left."""
    rows = pl.read_parquet(dataset / name)
    rows = rows.filter(~pl.col("user_id").is_in(list(user_ids)).fill_null(False))
    if rows.is_empty():
        return []
    stem = name.removesuffix(".parquet")[: len("quarantine/log-00000")]
    target = dataset / versioned(f"{stem}.parquet", version)
    pq.write_table(to_arrow(rows), target, compression="zstd")
    return [target]


def _blocked(forgotten: Forgotten | None, user_ids: Sequence[str]) -> Forgotten:
    salt = secrets.token_hex(16) if forgotten is None else forgotten.salt
    known = set() if forgotten is None else set(forgotten.users)
    return Forgotten(salt=salt, users=tuple(sorted(known | {forgotten_hash(salt, user) for user in user_ids})))
