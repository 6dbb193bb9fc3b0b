"""manifest.json of a prepared data set: what is inside, where it came from, and the hashes that identify it."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from recsys_ksa.config import Strict
from recsys_ksa.errors import DataError
from recsys_ksa.order import TieKind
from recsys_ksa.schema import FORMAT_VERSION, SPLIT_COLUMNS

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


class Counts(Strict):
    """Sizes of the data set."""

    users: int
    items: int
    """Without row 0, the unknown item."""
    events: int
    shortest_history: int
    median_history: float
    longest_history: int


class Manifest(Strict):
    """The whole of manifest.json."""

    format_version: int
    code_version: str
    content_hash: str
    """SHA-256 over canonical rows of the histories; see `content_hash`."""
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
    has_title: bool
    side_features: tuple[str, ...]
    counts: Counts
    split: dict[str, dict[str, int]]
    """`global`: {valid_start, test_start, log_end} in the data set's seconds; absent with an ordinal clock."""
    logs: tuple[SourceLog, ...]
    items_files: tuple[SourceFile, ...] = ()
    """The items file (`--items`), where one was given."""
    items_described: int = 0
    """Items of the data set that the items file describes."""
    config: dict[str, Any]
    """The resolved PrepareConfig."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of every file but this one and the cache, by path relative to the data set."""

    def save(self, directory: Path) -> None:
        """Write manifest.json into `directory`."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        DataError: it is missing, broken, or of another format version.
    """
    path = Path(directory) / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{directory}: expected a prepared data set ({MANIFEST}), got: {error.strerror}. Run `ksa prepare` first."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got: {error}. Prepare the data set again.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}. Prepare it with this version."
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where}: {first['msg']}. Prepare the data set again.") from error


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(directory: Path, manifest: Manifest, name: str) -> Path:
    """Return the path of a file of the data set after comparing its sha256 with the manifest's.

    Raises:
        DataError: the file is not in the manifest, missing, or altered.
    """
    path = Path(directory) / name
    if name not in manifest.files:
        raise DataError(f"{path}: expected a file named in {MANIFEST}, which does not name it. Prepare the data again.")
    if not path.is_file():
        raise DataError(f"{path}: expected a file of the data set, found none. Prepare the data set again.")
    found = file_hash(path)
    if found != manifest.files[name]:
        raise DataError(
            f"{path}: expected sha256 {manifest.files[name][:12]}..., got {found[:12]}...: the file was altered. "
            "Prepare the data set again."
        )
    return path


def content_hash(histories: pa.Table) -> str:
    """Return the SHA-256 of a histories table's canonical rows, in hexadecimal.

    Users go by user_index, whatever the table's order. Each user's row is: user_index and number of events
    (int64), user_id, then item_index (int32), timestamp (int64), tie, and where the log has them event_id and
    event_type (int8). Numbers are little-endian; a string is its length as int64 and its bytes; a list of strings
    is the lengths as int64, then all bytes. Split positions have a hash of their own.

    Args:
        histories: a table in `schema.histories_schema`.
    """
    table = histories.sort_by("user_index").combine_chunks()
    digest = hashlib.sha256(b"recsys-ksa histories 1\n")
    names = [
        name for name in ("item_index", "timestamp", "tie", "event_id", "event_type") if name in table.column_names
    ]
    digest.update((",".join(names) + "\n").encode())
    if table.num_rows == 0:
        return digest.hexdigest()
    user_index = table.column("user_index").to_numpy()
    user_ids = table.column("user_id").to_pylist()
    columns = [_Cells.of(table.column(name)) for name in names]
    offsets = columns[0].offsets.tolist()
    for row, user_id in enumerate(user_ids):
        first, last = offsets[row], offsets[row + 1]
        raw = user_id.encode()
        digest.update(np.array([user_index[row], last - first, len(raw)], dtype="<i8").tobytes() + raw)
        for column in columns:
            column.update(digest, first, last)
    return digest.hexdigest()


def split_hash(split: dict[str, dict[str, int]], histories: pa.Table) -> str:
    """Return the SHA-256 of the split's definition and of each user's positions (users by index, int32)."""
    table = histories.select(["user_index", *SPLIT_COLUMNS]).sort_by("user_index")
    digest = hashlib.sha256(json.dumps(split, sort_keys=True).encode() + b"\n")
    digest.update(table.column("user_index").to_numpy().astype("<i8").tobytes())
    for name in SPLIT_COLUMNS:
        digest.update(name.encode() + b"\n")
        digest.update(table.column(name).to_numpy().astype("<i4").tobytes())
    return digest.hexdigest()


class _Cells:
    """The values of one list column, ready to be cut by user without copying."""

    def __init__(self, offsets: np.ndarray, values: memoryview, width: int, ends: np.ndarray | None) -> None:
        self.offsets, self.values, self.width, self.ends = offsets, values, width, ends

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "_Cells":
        array = pa.concat_arrays(column.chunks)
        offsets = array.offsets.to_numpy()
        flat = array.values
        if pa.types.is_large_binary(flat.type) or pa.types.is_large_string(flat.type):
            _, ends, values = flat.buffers()
            ends_array = np.frombuffer(ends, dtype="<i8")[flat.offset :]
            return cls(offsets, memoryview(values if values is not None else b""), 0, ends_array)
        numbers = np.ascontiguousarray(flat.to_numpy())
        numbers = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)
        return cls(offsets, memoryview(numbers.tobytes()), numbers.itemsize, None)

    def update(self, digest: Any, first: int, last: int) -> None:
        if self.ends is None:
            digest.update(self.values[first * self.width : last * self.width])
        else:
            ends = self.ends[first : last + 1]
            digest.update(np.diff(ends).tobytes())
            digest.update(self.values[int(ends[0]) : int(ends[-1])])
