"""Writes a run directory: config, items and vocabularies at the start, weights and run.json at the end."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from safetensors.torch import save_file

from recsys_ksa import __version__
from recsys_ksa.config import RunConfig, dump_config, load_config
from recsys_ksa.data.popularity import DayCounts
from recsys_ksa.errors import RunError
from recsys_ksa.features.definitions import feature_hashes
from recsys_ksa.model.features import FeatureSchema, MultiFeature, SideFeature
from recsys_ksa.model.fingerprint import release_hash, state_fingerprint
from recsys_ksa.model.scoring import ScoringNetwork
from recsys_ksa.run import (
    CONFIG_FILE,
    INFO_FILE,
    ITEMS_FILE,
    METRICS_FILE,
    POPULARITY_FILE,
    VOCAB_FOLDER,
    WEIGHTS_FILE,
    RunInfo,
)
from recsys_ksa.train.checkpoint import Weights

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset

DATA_FILE = "data.json"
"""Hashes of the data set a run was begun on; `run.json` holds them once training has ended."""


def feature_schema(dataset: "Dataset", config: RunConfig) -> FeatureSchema:
    """Return what the network must know of the data set; side features the data set lacks are left to its check."""
    side = {
        name: SideFeature(len(dataset.vocab[name]), dataset.items.side[name])
        for name in config.model.side_features
        if name in dataset.items.side
    }
    multi = {
        name: MultiFeature(lists.offsets, lists.index, len(dataset.vocab[name]))
        for name, lists in dataset.items.multi.items()
        if name in config.model.side_features
    }
    vectors = {name: each for name, each in dataset.items.vectors.items() if name in config.model.side_features}
    known = {} if dataset.histories.users is None else dataset.histories.users.features
    users = {name: known[name] for name in config.model.user_features if name in known}
    num_event_types = len(dataset.vocab.get("event_type", ()))
    return FeatureSchema(dataset.num_items, num_event_types, side, dataset.manifest.clock, multi, vectors, users)


def begin_run(run: Path, config: RunConfig, dataset: "Dataset") -> None:
    """Create the directory with all that is known before training.

    Raises:
        RunError: something is there already, or the place cannot be written.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise RunError(
            f"{run}: expected no such directory, found one. Name another --out, or go on with it by --resume."
        )
    try:
        (run / VOCAB_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{run}: expected a directory that can be written, got: {error.strerror}. Name another."
        ) from error
    for name, source in _tables(dataset).items():
        shutil.copyfile(source, run / name)
    if config.model.item_bias == "popularity-7d":
        _write(run / POPULARITY_FILE, DayCounts.of_histories(dataset.histories).save)
    _write_text(run / DATA_FILE, json.dumps(_data_hashes(dataset)))
    _write_text(run / CONFIG_FILE, dump_config(config))


def reopen_run(run: Path, config: RunConfig, dataset: "Dataset") -> None:
    """Check that a run may go on with this config and data set, and store the config.

    Raises:
        RunError: it was begun with another data set, or with another model, loss, data section or seed.
    """
    try:
        began = json.loads((run / DATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{run}: expected a run to resume, found none. Leave --resume out to begin one.") from error
    same = all(pq.read_table(run / name).equals(pq.read_table(source)) for name, source in _tables(dataset).items())
    if began != _data_hashes(dataset) or not same:
        raise RunError(f"{run}: expected the data set it was begun on, got another ({dataset.path}). Train anew.")
    before = load_config(RunConfig, run / CONFIG_FILE)
    for key in ("seed", "model", "data", "loss"):
        if getattr(before, key) != getattr(config, key):
            raise RunError(
                f"{run}: {key} differs from the config it was begun with ({run / CONFIG_FILE}). "
                "Resume with the same, or train anew; only the section train may change."
            )
    _write_text(run / CONFIG_FILE, dump_config(config))


def finish_run(
    run: Path, config: RunConfig, dataset: "Dataset", network: ScoringNetwork, weights: Weights, longest: int
) -> None:
    """Write weights, then run.json: a run that has it is whole.

    Args:
        run: the directory, begun.
        config: resolved.
        dataset: what was trained on.
        network: on the CPU, holding `weights`.
        weights: what to keep.
        longest: events of the longest history as trained.
    """
    counts = run / POPULARITY_FILE
    info = RunInfo(
        name=config.name,
        data_hash=dataset.manifest.content_hash,
        split_hash=dataset.manifest.split_hash,
        training_span=config.data.split,
        tie=dataset.manifest.tie,
        clock=dataset.manifest.clock,
        feature_schema=network.features.as_dict(),
        exclude_seen=config.evaluate.exclude_seen,
        longest_trained_history=longest,
        state_fingerprint=state_fingerprint(network),
        release_hash=release_hash(network),
        code_version=__version__,
        num_items=dataset.num_items,
        feature_hashes=feature_hashes(config.model, dataset.vocab),
        popularity_hash=hashlib.sha256(counts.read_bytes()).hexdigest() if counts.exists() else None,
    )
    (run / INFO_FILE).unlink(missing_ok=True)
    _write(run / WEIGHTS_FILE, lambda path: save_file(weights, path))
    (run / METRICS_FILE).touch()
    _write_text(run / INFO_FILE, json.dumps(info.model_dump(mode="json"), indent=2))


def _data_hashes(dataset: "Dataset") -> dict[str, str]:
    return {"data_hash": dataset.manifest.content_hash, "split_hash": dataset.manifest.split_hash}


def _tables(dataset: "Dataset") -> dict[str, Path]:
    """Return the data set's tables that a run keeps a copy of, by their names in the run."""
    names = [ITEMS_FILE, *(f"{VOCAB_FOLDER}/{name}.parquet" for name in dataset.vocab)]
    return {name: dataset.path / dataset.manifest.table_file(name) for name in names}


def _write_text(path: Path, text: str) -> None:
    _write(path, lambda fresh: fresh.write_text(text + "\n", encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    fresh = path.with_name(path.name + ".new")
    write(fresh)
    os.replace(fresh, path)
