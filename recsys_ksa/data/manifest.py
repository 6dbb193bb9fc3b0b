"""manifest.json of a prepared data set: what is inside, where it came from, its version and hashes."""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from recsys_ksa.config_files import Strict
from recsys_ksa.data.hashes import file_hash
from recsys_ksa.errors import DataError
from recsys_ksa.features.users import UserKind
from recsys_ksa.order import TieKind
from recsys_ksa.schema import FORMAT_VERSION, user_vocabulary

Clock = Literal["unix", "relative", "ordinal"]
ChosenBy = Literal["default", "audit", "config"]
MANIFEST = "manifest.json"


class SourceFile(Strict):
    """One file of a log."""

    name: str
    """File name without its folder."""
    sha256: str
    num_bytes: int


class SourceLog(Strict):
    """One log that was prepared, and what became of its rows."""

    number: int
    """0 for the first log of a data set, counting on with each increment."""
    files: tuple[SourceFile, ...]
    """In the order in which they were read."""
    first_arrival: int
    """Arrival number of the log's first row; the others count on in the order of files and rows."""
    num_rows: int
    rejected: dict[str, int]
    """Rows left out, by reason."""
    duplicates: dict[str, int]
    """Rows dropped because an earlier row was the same event, by the rule that found them."""
    filtered: dict[str, int]
    """Rows dropped by the filters of the config, by filter."""


class TieAudit(Strict):
    """Whether the order of events with equal timestamps means anything, measured before duplicates are dropped."""

    order: TieKind
    """The order that was audited: the log's own (`id` where it has event ids, else `arrival`)."""
    gap_0_share: float
    """Share of the gaps between neighbouring events of a user that are 0 seconds."""
    tied_target_share: float
    """Share of users whose last event has the timestamp of the one before."""
    num_tied_pairs: int
    """Neighbouring events of a user with equal timestamps and different items."""
    next_id_greater: float | None
    """P(next item id > item id | tie) over those pairs; null without any. Ids that are all integers compare as such."""
    is_artefact: bool
    """More than .05 away from .5 on at least 1,000 pairs: the source sorted its ties."""


class Forgotten(Strict):
    """Users that must not come back."""

    salt: str
    """Random, of this data set; hexadecimal."""
    users: tuple[str, ...]
    """SHA-256 of salt (as bytes) and user id, in hexadecimal, sorted."""


class Counts(Strict):
    """Sizes of the data set."""

    users: int
    items: int
    """Without row 0, the unknown item."""
    events: int
    shortest_history: int
    median_history: float
    longest_history: int

    @classmethod
    def of(cls, lengths: NDArray[np.int64], items: int) -> "Counts":
        """Return the sizes of histories of these lengths (one a user) and a number of items."""
        there = lengths if len(lengths) else np.zeros(1, dtype=np.int64)
        return cls(
            users=len(lengths),
            items=items,
            events=int(lengths.sum()),
            shortest_history=int(there.min()),
            median_history=float(np.median(there)),
            longest_history=int(there.max()),
        )


class Manifest(Strict):
    """The whole of manifest.json."""

    format_version: int
    code_version: str
    version: int = 0
    """Counts what was done to the data set: 0 is `ksa prepare`; each append, compact and forget adds one."""
    tables_version: int = 0
    """The version that wrote the items and vocabularies this version uses."""
    content_hash: str
    """SHA-256 over the digests of all canonical rows; see `hashes.content_hash`."""
    split_hash: str
    """SHA-256 over the split's definition and positions."""
    clock: Clock
    tie: TieKind
    """What orders events with equal timestamps; a model's service must follow it."""
    tie_chosen_by: ChosenBy
    tie_audit: TieAudit
    num_buckets: int
    has_event_type: bool
    has_event_id: bool
    has_value: bool = False
    has_title: bool
    side_features: tuple[str, ...]
    multi_features: tuple[str, ...] = ()
    """Features of several categories an item."""
    vectors: tuple[str, ...] = ()
    """Features that are a vector an item."""
    counts: Counts
    split: dict[str, dict[str, int]]
    """`global`: {valid_start, test_start, log_end} in the data set's seconds; absent with an ordinal clock."""
    logs: tuple[SourceLog, ...]
    items_files: tuple[SourceFile, ...] = ()
    """The items file (`--items`), where one was given."""
    items_described: int = 0
    """Items of the data set that the items file describes."""
    user_features: dict[str, UserKind] = {}
    """Features of users.parquet, by name; without any there is no such file."""
    users_files: tuple[SourceFile, ...] = ()
    """The tables of users (`--users`), where any was given."""
    users_described: int = 0
    """Users of the data set that they describe."""
    config: dict[str, Any]
    """The resolved PrepareConfig."""
    numbered_users: tuple[int, ...] = ()
    """Users that were ever given a number, by bucket; the next new user of a bucket counts on."""
    forgotten: Forgotten | None = None
    """Whom `ksa forget` removed, unreadable, so that later logs cannot bring them back."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of every file but this one and the cache, by path relative to the data set."""

    @property
    def tables(self) -> list[str]:
        """Names of the items and vocabularies; `table_file` says where they lie."""
        users = ["users.parquet"] if self.user_features else []
        return [*self.item_tables, *users, *(f"vocab/{name}.parquet" for name in self.user_vocabularies)]

    @property
    def item_tables(self) -> list[str]:
        """Those that speak of items and events."""
        return ["items.parquet", *(f"vocab/{name}.parquet" for name in self.vocabularies)]

    @property
    def user_vocabularies(self) -> list[str]:
        """Names of the categorical vocabularies of users."""
        return [user_vocabulary(name) for name, kind in self.user_features.items() if kind != "number"]

    @property
    def vocabularies(self) -> list[str]:
        """Names of the categorical vocabularies of events and items."""
        return [*(("event_type",) if self.has_event_type else ()), *self.side_features, *self.multi_features]

    def table_file(self, name: str) -> str:
        """Return where this version's `items.parquet` or `vocab/<name>.parquet` lies in the data set."""
        return versioned(name, self.tables_version)

    def save(self, directory: Path) -> None:
        """Put manifest.json into `directory` in one step: a reader sees the old one or this one whole.

        The files it names must be on disk before.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        unfinished = directory / f".{MANIFEST}.{os.getpid()}"
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(directory / MANIFEST)


def versioned(name: str, version: int) -> str:
    """Return the file that version `version` writes for `name`: items.parquet -> items-00003.parquet; 0 keeps it."""
    path = PurePosixPath(name)
    return str(path.with_stem(f"{path.stem}-{version:05d}")) if version else name


def earlier_versions(directory: Path) -> list[int]:
    """Return the versions of a data set before the current one that are still there."""
    return sorted(int(path.stem) for path in (Path(directory) / "manifests").glob("[0-9]*.json"))


def read_manifest(directory: Path, version: int | None = None) -> Manifest:
    """Read and check the manifest of the current version, or of an earlier one.

    Raises:
        DataError: it is missing, broken, or of another format version.
    """
    path = Path(directory) / (MANIFEST if version is None else f"manifests/{version:05d}.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{directory}: expected a prepared data set ({path.name}), got: {error.strerror}. Run `ksa prepare` first."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got: {error}. Prepare the data set again.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}. Prepare it again with this version."
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where}: {first['msg']}. Prepare the data set again.") from error


def check_file(directory: Path, manifest: Manifest, name: str) -> Path:
    """Return the path of a file of the data set after comparing its sha256 with the manifest's.

    Raises:
        DataError: the file is not in the manifest, missing, or altered.
    """
    path = Path(directory) / name
    if name not in manifest.files:
        raise DataError(f"{path}: expected a file named in {MANIFEST}, which does not name it. Prepare the data again.")
    return check_hash(path, manifest.files[name])


def check_hash(path: Path, expected: str) -> Path:
    """Return the path of a file after comparing its sha256.

    Raises:
        DataError: the file is missing or altered.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a file of the data set, found none. Prepare the data set again.")
    found = file_hash(path)
    if found != expected:
        raise DataError(
            f"{path}: expected sha256 {expected[:12]}..., got {found[:12]}...: the file was altered. "
            "Prepare the data set again."
        )
    return path
