# pyright: standard
"""The histories as they lie in histories/part-<version>-<bucket>.parquet, read in bounded memory.

A later version's part holds whole rows of the users it touched; of a user in several parts the newest row counts.
Users come in blocks by user_index, `user_index = bucket + num_buckets * n`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys_ksa.data.hashes import Split
from recsys_ksa.data.manifest import Manifest, check_file
from recsys_ksa.errors import DataError

BLOCK_EVENTS = 1 << 17
"""Events of one block, about."""
ROW_GROUP_EVENTS = 1 << 16
"""Events of one row group of a part, about: what a reader must hold of each part."""
_GLOBAL = {"global_valid": "valid_start", "global_test": "test_start"}


def part_name(version: int, bucket: int) -> str:
    """Return the name of the part that a version writes for a bucket."""
    return f"histories/part-{version:05d}-{bucket:05d}.parquet"


def bucket_of(name: str) -> int:
    """Return the bucket of a part, or of its rows, by the name."""
    return int(name.rsplit(".", 1)[0].rsplit("-", 1)[1])


def parts_by_bucket(files: Iterable[str]) -> dict[int, list[str]]:
    """Return each bucket's parts among a data set's files, oldest first."""
    parts: dict[int, list[str]] = defaultdict(list)
    for name in sorted(name for name in files if name.startswith("histories/")):
        parts[bucket_of(name)].append(name)
    return dict(parts)


class HasUsers(Protocol):
    """A part, or what was made of it."""

    users: NDArray[np.int64]
    """[rows] user_index, ascending."""
    newest: NDArray[np.bool_]
    """[rows] whether no later part has this user."""


def mark_newest(parts: Sequence[HasUsers]) -> None:
    """Say which rows of a bucket's parts, oldest first, are the newest of their users."""
    later = np.empty(0, dtype=np.int64)
    for part in reversed(parts):
        part.newest = ~np.isin(part.users, later) if len(later) else np.ones(len(part.users), dtype=bool)
        later = np.concatenate([later, part.users[part.newest]])


@dataclass
class Part:
    """One part, read forward by user_index."""

    path: Path
    columns: Sequence[str] | None
    users: NDArray[np.int64] = field(init=False)
    """[rows] user_index, ascending."""
    newest: NDArray[np.bool_] = field(init=False)
    """[rows] whether no later part has this user."""
    num_events: int = field(init=False)
    """In all rows."""

    def __post_init__(self) -> None:
        file = pq.ParquetFile(self.path)
        self.users = file.read(["user_index"]).column(0).to_numpy()
        self.newest = np.ones(len(self.users), dtype=bool)
        metadata = file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        columns = range(metadata.num_columns)
        leaf = next(number for number in columns if metadata.schema.column(number).path.startswith("item_index."))
        self.num_events = sum(group.column(leaf).num_values for group in groups)
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self._group, self._held, self._row = 0, None, 0

    def before(self, user_index: int) -> pa.Table | None:
        """Return the next newest rows up to, without, `user_index`, or None."""
        stop = int(np.searchsorted(self.users, user_index))
        pieces = []
        while self._row < stop:
            if self._held is None:
                self._held = pq.ParquetFile(self.path).read_row_group(self._group, columns=self.columns)
            begin = int(self._ends[self._group]) - self._held.num_rows
            end = min(stop, int(self._ends[self._group]))
            piece, mask = self._held.slice(self._row - begin, end - self._row), self.newest[self._row : end]
            pieces.append(piece if mask.all() else piece.filter(pa.array(mask)))
            self._row = end
            if end == self._ends[self._group]:
                self._group, self._held = self._group + 1, None
        return pa.concat_tables(pieces) if pieces else None


def open_parts(directory: Path, names: Sequence[str], columns: Sequence[str] | None = None) -> list[Part]:
    """Return a bucket's parts, oldest first, each knowing which of its rows are the newest."""
    parts = [Part(directory / name, columns) for name in names]
    mark_newest(parts)
    return parts


def blocks(parts: Sequence[Part]) -> Iterator[pa.Table]:
    """Yield the newest rows of all parts by user_index, in tables of about `BLOCK_EVENTS` events."""
    users = np.sort(np.concatenate([part.users[part.newest] for part in parts])) if parts else np.empty(0, np.int64)
    num_events = sum(part.num_events * part.newest.mean() for part in parts if len(part.users))
    step = max(1, int(len(users) * BLOCK_EVENTS / max(num_events, 1)))
    for first in range(0, len(users), step):
        last = users[min(first + step, len(users)) - 1]
        tables = [table for part in parts if (table := part.before(int(last) + 1)) is not None]
        yield pa.concat_tables(tables).sort_by("user_index").combine_chunks()


def all_parts(directory: Path, files: Iterable[str]) -> list[Part]:
    """Return the parts among a data set's files."""
    return [part for names in parts_by_bucket(files).values() for part in open_parts(directory, names)]


def checked_parts(directory: Path, manifest: Manifest) -> list[Part]:
    """Return all parts of a data set, their files compared with the manifest's hashes.

    Raises:
        DataError: a part is missing or altered, or there are none.
    """
    names = [name for name in manifest.files if name.startswith("histories/")]
    if not names and manifest.counts.users:
        raise DataError(f"{directory}: expected histories/part-*.parquet in the manifest, got none. Prepare it again.")
    for name in names:
        check_file(directory, manifest, name)
    return all_parts(directory, names)


def with_global_split(block: pa.Table, split: Split) -> pa.Table:
    """Return the block with the positions of protocol `global` by this version's cuts.

    A part keeps the positions of the version that wrote it; a later log moves the cuts.
    """
    lists = block.column("timestamp").combine_chunks()
    offsets, timestamp = lists.offsets.to_numpy(), lists.values.to_numpy()
    for name, cut in _GLOBAL.items():
        if "global" in split:
            positions = count_before(timestamp, offsets, split["global"][cut])
        else:
            positions = np.diff(offsets)
        column = block.schema.get_field_index(name)
        block = block.set_column(column, block.schema.field(column), pa.array(positions, pa.int32(), safe=True))
    return block


def count_before(
    timestamp: NDArray[np.int64], offsets: NDArray[np.int64], cut: int, guess: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """Return how many events of each user lie before `cut`, by halving: int64 [T], offsets int64 [U + 1] -> int64 [U].

    Args:
        timestamp: never decreasing within a user.
        offsets: of the users.
        cut: a time.
        guess: [U] what is looked at first.
    """
    low, high = offsets[:-1].copy(), offsets[1:].copy()

    def look(users: NDArray[np.int64], at: NDArray[np.int64]) -> None:
        before = timestamp[at] < cut
        low[users[before]] = at[before] + 1
        high[users[~before]] = at[~before]

    if guess is not None:
        at = low + np.clip(guess, 0, high - low)
        users = np.flatnonzero(at < high)
        look(users, at[users])
        users = np.flatnonzero(low < at)
        look(users, at[users] - 1)
    users = np.flatnonzero(low < high)
    while len(users):
        look(users, (low[users] + high[users]) // 2)
        users = users[low[users] < high[users]]
    return low - offsets[:-1]
