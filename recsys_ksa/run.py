"""A run directory: the resolved config, weights, items and vocabularies, and where they come from.

    config.toml         the resolved config
    model.safetensors   weights, float32
    items.parquet       item_id <-> item_index, side features, titles
    vocab/*.parquet     the other vocabularies
    run.json            data and split hashes, training span, order, clock, fingerprints (`RunInfo`)
    metrics.jsonl       training curves
    popularity.parquet  events of each item by day, of a run with `model.item_bias = "popularity-7d"`
    index/              after `ksa index`

A *bundle* is a run without optimiser files. Imports without polars, mlflow and faiss.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from recsys_ksa.architectures import build_network
from recsys_ksa.config import RunConfig, Strict, TrainingSpan, load_config
from recsys_ksa.data.item_columns import Categories, vectors_of
from recsys_ksa.data.popularity import DayCounts
from recsys_ksa.errors import RunError
from recsys_ksa.features import UserFeature
from recsys_ksa.features.definitions import Vocabulary, feature_hashes
from recsys_ksa.model.features import Clock, FeatureSchema, MultiFeature, SideFeature
from recsys_ksa.model.fingerprint import release_hash
from recsys_ksa.model.network import Network
from recsys_ksa.model.scoring import ScoringNetwork
from recsys_ksa.order import TieKind
from recsys_ksa.schema import indices_column, user_vocabulary, vector_column

CONFIG_FILE = "config.toml"
WEIGHTS_FILE = "model.safetensors"
ITEMS_FILE = "items.parquet"
VOCAB_FOLDER = "vocab"
INFO_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
POPULARITY_FILE = "popularity.parquet"
INDEX_FOLDER = "index"
BUNDLE_PARTS = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ITEMS_FILE,
    VOCAB_FOLDER,
    INFO_FILE,
    METRICS_FILE,
    POPULARITY_FILE,
    INDEX_FOLDER,
)


class RunInfo(Strict):
    """run.json: where a run comes from and what it may be used with."""

    name: str
    """The run's name in reports."""
    data_hash: str
    """Content hash of the data set it was trained on."""
    split_hash: str
    """Hash of that data set's split."""
    training_span: TrainingSpan
    """What was trained on; evaluation refuses protocols whose answers lie inside."""
    tie: TieKind
    """How events of one second are ordered; append and the service follow it."""
    clock: Clock
    """What timestamps mean."""
    feature_schema: dict[str, Any]
    """Sizes of the embedding tables."""
    exclude_seen: bool
    """Whether answers leave out items the user already had, unless asked."""
    longest_trained_history: int
    """Events; longer histories are answered and flagged."""
    state_fingerprint: str
    """What user states depend on."""
    release_hash: str
    """What answers depend on."""
    code_version: str
    """Version of recsys-ksa that wrote the run."""
    num_items: int
    """Item rows, row 0 (unknown) included."""
    num_base_items: int | None = None
    """Of them, those that user states were computed with before items were appended to the run; None: all."""
    feature_hashes: dict[str, str] | None = None
    """What each feature meant in training: of its definition and vocabulary; None in runs older than these hashes."""
    popularity_hash: str | None = None
    """SHA-256 of popularity.parquet; None for a run without one."""


@dataclass(frozen=True)
class RunItems:
    """The run's items, row = item_index; row 0 is the unknown item (item_id None)."""

    item_id: list[str | None]
    title: list[str | None] | None
    count: np.ndarray
    index_of: dict[str, int]


@dataclass(frozen=True)
class Run:
    """An opened run directory; the network is loaded by `load_network`."""

    path: Path
    config: RunConfig
    info: RunInfo
    items: RunItems
    event_types: dict[str, int]
    features: FeatureSchema
    user_categories: Mapping[str, Mapping[str, int]]
    """Row of each category of the users' features, by feature."""


def open_run(path: str | Path) -> Run:
    """Read everything of a run or bundle but its weights.

    Raises:
        RunError: a file is missing or damaged, or files disagree.
    """
    path = Path(path)
    info = _read_info(path)
    config = load_config(RunConfig, path / CONFIG_FILE)
    table = _read_table(path / ITEMS_FILE)
    if table.num_rows != info.num_items:
        raise RunError(
            f"{path / ITEMS_FILE}: expected {info.num_items} rows as {INFO_FILE} says, got {table.num_rows}. "
            "Copy the run again, whole."
        )
    item_id = table["item_id"].to_pylist()
    side, multi, vectors = {}, {}, {}
    vocabularies: dict[str, list[str | None]] = {}
    for name in config.model.side_features:
        if vector_column(name) in table.column_names:
            vectors[name] = vectors_of(table[vector_column(name)])
            continue
        vocabularies[name] = _read_table(path / VOCAB_FOLDER / f"{name}.parquet")["value"].to_pylist()
        rows = len(vocabularies[name])
        if indices_column(name) in table.column_names:
            lists = Categories.of(table[indices_column(name)])
            multi[name] = MultiFeature(lists.offsets, lists.index, rows)
        elif f"{name}_index" in table.column_names:
            side[name] = SideFeature(rows, table[f"{name}_index"].to_numpy().astype(np.int32))
        else:
            raise RunError(f"{path / ITEMS_FILE}: expected the column {name}_index, got {table.column_names}.")
    types = path / VOCAB_FOLDER / "event_type.parquet"
    names = _read_table(types)["value"].to_pylist() if types.exists() else []
    if types.exists():
        vocabularies["event_type"] = names
    users: dict[str, UserFeature] = {}
    user_categories: dict[str, dict[str, int]] = {}
    for name in config.model.user_features:
        if name in config.model.user_edges:
            users[name] = UserFeature("number")
            continue
        values = _read_table(path / VOCAB_FOLDER / f"{user_vocabulary(name)}.parquet")["value"].to_pylist()
        vocabularies[user_vocabulary(name)] = values
        users[name] = UserFeature(info.feature_schema["users"][name]["kind"], len(values))
        user_categories[name] = {value: row for row, value in enumerate(values) if value is not None}
    check_features(path, config, info, vocabularies, "its own files and this version")
    return Run(
        path=path,
        config=config,
        info=info,
        items=RunItems(
            item_id=item_id,
            title=table["title"].to_pylist() if "title" in table.column_names else None,
            count=table["count"].to_numpy(),
            index_of={name: row for row, name in enumerate(item_id) if name is not None},
        ),
        event_types={name: row for row, name in enumerate(names) if name is not None},
        features=FeatureSchema(info.num_items, len(names), side, info.clock, multi, vectors, users),
        user_categories=user_categories,
    )


def check_features(
    path: Path, config: RunConfig, info: RunInfo, vocabularies: Mapping[str, Vocabulary], whose: str
) -> None:
    """Refuse features that are not what the run was trained with.

    Args:
        path, config, info: of the run.
        vocabularies: as `feature_hashes` takes them.
        whose: who computes the features; for the message.

    Raises:
        RunError: another definition or vocabulary; the feature is named.
    """
    if info.feature_hashes is None:
        return
    found = feature_hashes(config.model, vocabularies)
    for name in sorted(found.keys() | info.feature_hashes.keys()):
        if found.get(name) != info.feature_hashes.get(name):
            raise RunError(
                f"{path / INFO_FILE}: feature {name!r}: expected the definition and vocabulary the run was trained "
                f"with ({_short(info.feature_hashes.get(name))}, recsys-ksa {info.code_version}), {whose} have another "
                f"({_short(found.get(name))}). Use what it was trained with, or train it anew."
            )


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def load_network(run: Run, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Network:
    """Return the run's network in eval mode, for user states and for serving.

    Raises:
        RunError: as `load_scoring_network`, and for an architecture that keeps no user state.
    """
    network = load_scoring_network(run, device, dtype)
    if not isinstance(network, Network):
        raise RunError(
            f"{run.path}: expected a run with model.architecture ksa, got {run.config.model.architecture}, which is "
            "for comparison and keeps no user state: nothing can be appended, indexed, recommended or served. "
            "Evaluate it with `ksa evaluate`."
        )
    return network


def load_scoring_network(
    run: Run, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ScoringNetwork:
    """Return the run's network in eval mode, of whatever architecture.

    Raises:
        RunError: the weights are missing, damaged, do not fit the config, or are not those run.json names.
    """
    network = build_network(run.config.model, run.features)
    file = run.path / WEIGHTS_FILE
    try:
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{file}: expected the weights of {CONFIG_FILE}'s network, got: {reason}") from error
    if (found := release_hash(network)) != run.info.release_hash:
        raise RunError(
            f"{file}: expected the release {run.info.release_hash[:12]} as {INFO_FILE} says, got {found[:12]}. "
            "The weights were replaced; copy the run again, whole."
        )
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_counts(run: Run) -> DayCounts:
    """Return how often each item was met by day in the data set the run was trained on, held-out days included.

    Raises:
        DataError: the file is missing or damaged.
        RunError: it is not the one run.json names.
    """
    file = run.path / POPULARITY_FILE
    counts = DayCounts.load(file)
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != run.info.popularity_hash:
        raise RunError(
            f"{file}: expected the counts {str(run.info.popularity_hash)[:12]} as {INFO_FILE} says, got {found[:12]}. "
            "Copy the run again, whole."
        )
    return counts


def _read_info(path: Path) -> RunInfo:
    file = path / INFO_FILE
    try:
        return RunInfo.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunError(
            f"{path}: expected a run directory with {INFO_FILE}, got {error.strerror}. Check the path."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: expected JSON, got: {error}. Copy the run again, whole.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{file}: {where}: {first['msg']}. The run was written by another version.") from error


def _read_table(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{file}: expected a Parquet table, got: {error}. Copy the run again, whole.") from error
