"""A prepared data set, opened for reading: memory-mapped numpy arrays, no copy, no loop over events.

Torch-free and polars-free. U users, T events, I items (rows of items.parquet without row 0).
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys_ksa.data.cache import map_cache
from recsys_ksa.data.item_columns import Categories, vectors_of
from recsys_ksa.data.manifest import Manifest, check_file, read_manifest
from recsys_ksa.data.user_table import read_users
from recsys_ksa.errors import DataError
from recsys_ksa.features.users import UserColumns
from recsys_ksa.schema import SPLIT_COLUMNS, indices_column, vector_column


@dataclass(frozen=True)
class Histories:
    """All histories, users ordered by user_index. Arrays are read-only views of the mapped cache."""

    user_id: pa.StringArray
    """[U]; `user_ids()` gives them as str."""
    user_index: NDArray[np.int64]
    """[U], ascending."""
    offsets: NDArray[np.int64]
    """[U + 1]: user u's events are rows offsets[u] : offsets[u + 1]."""
    item_index: NDArray[np.int32]
    """[T]"""
    timestamp: NDArray[np.int64]
    """[T], seconds by the data set's clock, never decreasing within a user."""
    event_type: NDArray[np.int8] | None
    """[T], index into vocab["event_type"]; None where the log has none."""
    split: dict[str, NDArray[np.int32]]
    """[U] each, by name in `schema.SPLIT_COLUMNS`: where a protocol's validation (test) begins in the history."""
    value: NDArray[np.float32] | None = None
    """[T], NaN where an event has none; None where the log has no values."""
    users: UserColumns | None = None
    """Features of the users, row by row; None where the data set knows none."""
    mapped_from: tuple[Path, Manifest] | None = None
    """The data set, where these are views of its cache."""

    def __reduce__(self) -> Any:
        """Tell another process where to map the histories from, not what is in them."""
        if self.mapped_from is None:
            return Histories, tuple(getattr(self, each.name) for each in fields(self))
        return map_histories, self.mapped_from

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_index)

    @property
    def num_events(self) -> int:
        """T."""
        return len(self.item_index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Events of each user, int64 [U]."""
        return np.diff(self.offsets)

    def length(self, user: int) -> int:
        """Return the number of events of the user in row `user`."""
        return int(self.offsets[user + 1] - self.offsets[user])

    def rows(self, user: int) -> slice:
        """Return the rows of T that are the events of the user in row `user`."""
        return slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def user_ids(self) -> list[str]:
        """Return all user ids as str, in the order of rows."""
        return self.user_id.to_pylist()


@dataclass(frozen=True)
class Items:
    """items.parquet by item_index; row 0 is padding and the unknown item."""

    item_id: list[str | None]
    """[I + 1]; None in row 0, and for an item that `ksa forget` blanked."""
    count: NDArray[np.int64]
    """[I + 1] events of each item in the data set; 0 in row 0."""
    first_seen: NDArray[np.int64]
    """[I + 1] timestamp of each item's first event; -1 in row 0."""
    side: dict[str, NDArray[np.int32]]
    """[I + 1] each, by side feature: index into the vocabulary of that name; 0 where unknown."""
    title: list[str | None] | None
    """[I + 1], None where the log's items had no titles."""
    multi: dict[str, Categories] = field(default_factory=dict)
    """By feature of several categories: rows of the vocabulary of that name."""
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """[I + 1, D] by name; zeros where an item has none."""


@dataclass(frozen=True)
class Dataset:
    """A prepared data set; see pipelines/README.md for the files."""

    path: Path
    manifest: Manifest
    items: Items
    vocab: dict[str, list[str | None]]
    """`event_type` where the log has it, and each side feature: index -> value; index 0 is unknown (None)."""
    histories: Histories

    @property
    def num_items(self) -> int:
        """Rows of the item table, row 0 included: I + 1."""
        return len(self.items.item_id)

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Item id -> item_index."""
        return {item: index for index, item in enumerate(self.items.item_id) if item is not None}


def open_dataset(path: Path | str, version: int | None = None) -> Dataset:
    """Open the data set that `ksa prepare` wrote at `path`: the current version, or an earlier one.

    The sha256 of every file read is compared with the manifest, the cache's with its seal; a missing cache is
    rebuilt from the parts. The version that the manifest names is read whole, whatever is appended meanwhile.

    Raises:
        DataError: it is no data set, of another format version, damaged or altered.
    """
    path = Path(path)
    manifest = read_manifest(path, version)
    try:
        return _open(path, manifest)
    except DataError:
        if version is not None:
            raise
        now = read_manifest(path)
        if now.version == manifest.version:
            raise
        return _open(path, now)  # `ksa compact` or `forget` removed the files of the version that was being read


def _open(path: Path, manifest: Manifest) -> Dataset:
    items = _read_items(path, manifest)
    vocab = {
        name: _read_vocabulary(path, manifest, name) for name in manifest.vocabularies + manifest.user_vocabularies
    }
    histories = _with_users(_view(map_cache(path, manifest)), path, manifest)
    found = (histories.num_users, len(items.item_id) - 1, histories.num_events)
    counts = manifest.counts
    if found != (counts.users, counts.items, counts.events):
        raise DataError(
            f"{path}: expected {counts.users} users, {counts.items} items, {counts.events} events, got {found}. "
            "Prepare the data set again."
        )
    return Dataset(path, manifest, items, vocab, histories)


def map_histories(path: Path, manifest: Manifest) -> Histories:
    """Map the histories of a data set that is open already: its cache is not hashed again.

    Raises:
        DataError: the cache was removed, or is another version's.
    """
    return _with_users(_view(map_cache(path, manifest, checked=True)), path, manifest)


def _with_users(histories: Histories, path: Path, manifest: Manifest) -> Histories:
    users = read_users(path, manifest, histories.user_index)
    return replace(histories, users=users, mapped_from=(path, manifest))


def _read_items(path: Path, manifest: Manifest) -> Items:
    table = pq.read_table(check_file(path, manifest, manifest.table_file("items.parquet"))).sort_by("item_index")
    return Items(
        item_id=table.column("item_id").to_pylist(),
        count=table.column("count").to_numpy(),
        first_seen=table.column("first_seen").fill_null(-1).to_numpy(),
        side={name: table.column(f"{name}_index").to_numpy() for name in manifest.side_features},
        title=table.column("title").to_pylist() if manifest.has_title else None,
        multi={name: Categories.of(table.column(indices_column(name))) for name in manifest.multi_features},
        vectors={name: vectors_of(table.column(vector_column(name))) for name in manifest.vectors},
    )


def _read_vocabulary(path: Path, manifest: Manifest, name: str) -> list[str | None]:
    table = pq.read_table(check_file(path, manifest, manifest.table_file(f"vocab/{name}.parquet")))
    return table.sort_by("index").column("value").to_pylist()


def _view(batch: pa.RecordBatch) -> Histories:
    item_index = batch.column("item_index")
    has_event_type = "event_type" in batch.schema.names
    return Histories(
        user_id=batch.column("user_id"),
        user_index=batch.column("user_index").to_numpy(),
        offsets=item_index.offsets.to_numpy(),
        item_index=item_index.values.to_numpy(),
        timestamp=batch.column("timestamp").values.to_numpy(),
        event_type=batch.column("event_type").values.to_numpy() if has_event_type else None,
        split={name: batch.column(name).to_numpy() for name in SPLIT_COLUMNS},
        value=batch.column("value").values.to_numpy() if "value" in batch.schema.names else None,
    )
