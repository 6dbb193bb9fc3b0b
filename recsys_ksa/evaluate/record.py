"""What an evaluation leaves in a folder, for `ksa report` and for anyone's scripts.

rows.json          all figures, one row each
evaluation.json    what was asked, of which data and runs (`Record`)
users.parquet      each user's mean, so that any two models can be compared user by user
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from recsys_ksa.config import Strict
from recsys_ksa.errors import DataError
from recsys_ksa.evaluate.protocol import ProtocolName, RequestTime, usefulness
from recsys_ksa.evaluate.rows import Row, write_rows
from recsys_ksa.evaluate.seeds import recipe_hash
from recsys_ksa.evaluate.slices import Column
from recsys_ksa.model.state import full_kv_bytes, kv_bytes

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset
    from recsys_ksa.evaluate.evaluation import Evaluation, NamedRun

ROWS_FILE = "rows.json"
RECORD_FILE = "evaluation.json"
USERS_FILE = "users.parquet"
USER_SLICES = ("all", "new", "repeat")
"""Slices whose values are kept user by user."""
USERS = pa.schema(
    [
        pa.field("user_id", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("model", pa.dictionary(pa.int16(), pa.string()), nullable=False),
        pa.field("request_time", pa.dictionary(pa.int16(), pa.string())),
        pa.field("slice", pa.dictionary(pa.int16(), pa.string()), nullable=False),
        pa.field("metric", pa.dictionary(pa.int16(), pa.string()), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
"""One row a user and figure; a user without a target in the slice has none. `request_time` is null for baselines."""


class RunRecord(Strict):
    """A run that was evaluated."""

    model: str
    """What its rows are called."""
    name: str
    architecture: str
    attention: str
    layers: tuple[str, ...]
    chunk_size: int
    summaries_per_chunk: int
    window_chunks: int
    training_span: str
    longest_trained_history: int
    release_hash: str
    seed: int
    recipe_hash: str
    """Of the config without seed and name."""
    state_bytes_median: int | None
    """K/V of the median history; None where no state is kept."""
    state_bytes_longest: int | None


class Record(Strict):
    """What was asked, of which data and runs."""

    protocol: ProtocolName
    variants: tuple[RequestTime, ...]
    exclude_seen: bool
    max_length: int | None
    data_hash: str
    split_hash: str
    tie: str
    clock: str
    gap_0_share: float
    tied_target_share: float
    num_users: int
    num_questions: int
    num_targets: int
    num_items: int
    repeat_share: float
    median_history: int
    longest_history: int
    full_state_bytes_median: int
    """K/V of the median history with full attention, by the first run's config."""
    notes: dict[str, str]
    runs: tuple[RunRecord, ...]
    """The first is the one called `ksa`."""

    @property
    def told(self) -> RequestTime:
        """The request time on which claims of usefulness rest."""
        return usefulness(self.variants)


@dataclass(frozen=True)
class Recorded:
    """A record, its rows and its users' values, read back."""

    path: Path
    record: Record
    rows: list[Row]
    users: pa.Table


def write_record(evaluation: "Evaluation", dataset: "Dataset", runs: Sequence["NamedRun"], out: Path) -> list[Path]:
    """Write the three files into `out`; return their paths."""
    files = [out / ROWS_FILE, out / RECORD_FILE, out / USERS_FILE]
    write_rows(evaluation.rows, files[0])
    text = json.dumps(make_record(evaluation, dataset, runs).model_dump(mode="json"), indent=2)
    files[1].write_text(text + "\n", encoding="utf-8")
    user_ids = [dataset.histories.user_id[int(row)].as_py() for row in evaluation.users]
    write_users(files[2], user_ids, evaluation.columns, evaluation.values)
    return files


def make_record(evaluation: "Evaluation", dataset: "Dataset", runs: Sequence["NamedRun"]) -> Record:
    """Return the record of an evaluation."""
    manifest, lengths = dataset.manifest, dataset.histories.lengths
    median, longest = int(np.median(lengths)), int(lengths.max())
    return Record(
        protocol=evaluation.protocol,
        variants=evaluation.variants,
        exclude_seen=evaluation.exclude_seen,
        max_length=evaluation.max_length,
        data_hash=manifest.content_hash,
        split_hash=manifest.split_hash,
        tie=manifest.tie,
        clock=manifest.clock,
        gap_0_share=manifest.tie_audit.gap_0_share,
        tied_target_share=manifest.tie_audit.tied_target_share,
        num_users=evaluation.num_users,
        num_questions=evaluation.num_questions,
        num_targets=evaluation.num_targets,
        num_items=dataset.num_items - 1,
        repeat_share=evaluation.repeat_share,
        median_history=median,
        longest_history=longest,
        full_state_bytes_median=full_kv_bytes(runs[0].run.config.model, median),
        notes=evaluation.notes,
        runs=tuple(_run_record(named, median, longest) for named in runs),
    )


def _run_record(named: "NamedRun", median: int, longest: int) -> RunRecord:
    info, model = named.run.info, named.run.config.model
    keeps = model.architecture == "ksa"
    return RunRecord(
        model=named.name,
        name=info.name,
        architecture=model.architecture,
        attention=model.attention,
        layers=model.layer_kinds,
        chunk_size=model.chunk_size,
        summaries_per_chunk=model.summaries_per_chunk,
        window_chunks=model.window_chunks,
        training_span=info.training_span,
        longest_trained_history=info.longest_trained_history,
        release_hash=info.release_hash,
        seed=named.run.config.seed,
        recipe_hash=recipe_hash(named.run.config),
        state_bytes_median=kv_bytes(model, median) if keeps else None,
        state_bytes_longest=kv_bytes(model, longest) if keeps else None,
    )


def write_users(path: Path, user_ids: list[str], columns: Sequence[Column], values: NDArray[np.float64]) -> None:
    """Write the users' values of `USER_SLICES`.

    Args:
        path: of the Parquet file.
        user_ids: of the rows, U of them.
        columns: C of them.
        values: float64 [U, C], NaN where a user has none.
    """
    kept = [at for at, column in enumerate(columns) if column.slice in USER_SLICES]
    ids = pa.array(user_ids, pa.string())
    with pq.ParquetWriter(path, USERS, compression="zstd") as writer:
        for at in kept:
            column, value = columns[at], values[:, at]
            has = np.flatnonzero(~np.isnan(value))
            words = (column.model, column.request_time, column.slice, column.metric)
            told = [pa.array([word] * len(has), pa.string()) for word in words]
            parts = [ids.take(pa.array(has)), *told, pa.array(value[has])]
            arrays = [part.cast(field.type) for part, field in zip(parts, USERS)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=USERS))


def read_record(path: Path) -> Recorded:
    """Read what `write_record` wrote.

    Raises:
        DataError: a file is missing, damaged, or of another version.
    """
    try:
        record = Record.model_validate(json.loads((path / RECORD_FILE).read_text(encoding="utf-8")))
        rows = [Row(**row) for row in json.loads((path / ROWS_FILE).read_text(encoding="utf-8"))]
        users = pq.read_table(path / USERS_FILE, schema=USERS)
    except OSError as error:
        raise DataError(f"{path}: expected an evaluation, got: {error}. Run `ksa evaluate` again.") from error
    except (ValueError, TypeError, ValidationError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: expected an evaluation of this version, got: {reason}. Run `ksa evaluate` again."
        ) from error
    return Recorded(path, record, rows, users)
