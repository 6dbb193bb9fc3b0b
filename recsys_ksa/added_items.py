# pyright: standard
# pyarrow has no type stubs.
"""Adds to a run the items that were first met after it was trained: no weight changes, and every user's state stays.

A new item has a row of zeros, which is what events of hidden items (`model.item_dropout`) were trained on: what is
known of it is its side features. With `model.item_vectors = "content"` it is scored by them, with the others by the
item bias alone, until the run is trained anew; and by its owner's own counts where the run has them
(`model.own_item_bias`). A learned item bias of it is the lowest that was learned.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from recsys_ksa.architectures import build_network
from recsys_ksa.data.jagged_arrays import Ints
from recsys_ksa.errors import RunError
from recsys_ksa.model.fingerprint import ITEM_TABLES, release_hash, state_fingerprint
from recsys_ksa.run import (
    BUNDLE_PARTS,
    INDEX_FOLDER,
    INFO_FILE,
    ITEMS_FILE,
    VOCAB_FOLDER,
    WEIGHTS_FILE,
    Run,
    RunInfo,
    load_network,
    open_run,
)
from recsys_ksa.schema import UNKNOWN_CATEGORY, indices_column, vector_column

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset


def add_items(run: Run, dataset: "Dataset", out: Path) -> int:
    """Write `run` with the items of `dataset` that it does not know at `out`, which must not exist; return how many.

    Items are matched by id. New ones come after the run's, in the data set's order; categories of theirs that the run
    does not know are unknown. Popularity counts stay those of training, and the index is left out.

    Raises:
        RunError: the data set lacks a column that the run has, or has it in another form; or the run keeps no states.
    """
    load_network(run)
    new = [row for row, item in enumerate(dataset.items.item_id) if item is not None and item not in run.items.index_of]
    items = _with_new_rows(run, dataset, np.array(new, dtype=np.int64))
    try:
        _copy(run.path, out)
        pq.write_table(items, out / ITEMS_FILE)
        weights = {name: _longer(name, value, len(new)) for name, value in load_file(out / WEIGHTS_FILE).items()}
        save_file(weights, out / WEIGHTS_FILE)
        info = run.info.model_copy(
            update={
                "num_items": items.num_rows,
                "num_base_items": run.info.num_base_items or run.info.num_items,
                "feature_schema": run.info.feature_schema | {"num_items": items.num_rows},
            }
        )
        _write_info(out, info)
        network = build_network(run.config.model, open_run(out).features)
        network.load_state_dict(weights)
        assert state_fingerprint(network, info.num_base_items) == info.state_fingerprint
        _write_info(out, info.model_copy(update={"release_hash": release_hash(network)}))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return len(new)


def _copy(source: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for name in BUNDLE_PARTS:
        if (source / name).is_dir() and name != INDEX_FOLDER:
            shutil.copytree(source / name, out / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _longer(name: str, value: Tensor, num: int) -> Tensor:
    """Return a parameter with a row for each of `num` new items, where it has one for each item."""
    if name == "item_bias":
        return torch.cat((value, value[1:].min().expand(num)))
    return F.pad(value, (0, 0, 0, num)) if name.endswith(ITEM_TABLES) else value


def _write_info(run: Path, info: RunInfo) -> None:
    (run / INFO_FILE).write_text(json.dumps(info.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def _with_new_rows(run: Run, dataset: "Dataset", new: Ints) -> pa.Table:
    """Return the run's items.parquet with the data set's item rows `new` behind its own."""
    table, items = pq.read_table(run.path / ITEMS_FILE), dataset.items
    columns: dict[str, Any] = {
        "item_index": table.num_rows + np.arange(len(new)),
        "item_id": [items.item_id[row] for row in new],
        "count": items.count[new],
        "first_seen": items.first_seen[new],
    }
    if items.title is not None:
        columns["title"] = [items.title[row] for row in new]
    for name, side in items.side.items():
        columns[f"{name}_index"] = _renumbered(run, dataset, name)[side[new]]
    for name, lists in items.multi.items():
        to = _renumbered(run, dataset, name)
        found = (to[lists.index[lists.offsets[row] : lists.offsets[row + 1]]] for row in new)
        columns[indices_column(name)] = [np.sort(known[known != UNKNOWN_CATEGORY]).tolist() for known in found]
    for name, vectors in items.vectors.items():
        columns[vector_column(name)] = list(vectors[new])
    try:
        rows = [pa.array(columns[field.name], type=field.type) for field in table.schema]
    except KeyError as error:
        raise RunError(
            f"{dataset.path}: expected items with the run's column {error}, got none. Prepare the data set with it."
        ) from error
    except pa.ArrowInvalid as error:
        raise RunError(
            f"{dataset.path}: expected item columns as {run.path / ITEMS_FILE} has them, got: {error}. "
            "Prepare the data set as the one the run was trained on."
        ) from error
    return pa.concat_tables([table, pa.Table.from_arrays(rows, schema=table.schema)])


def _renumbered(run: Run, dataset: "Dataset", name: str) -> NDArray[np.int32]:
    """Return the run's number of each category of the data set's vocabulary; unknown where the run has none."""
    file = run.path / VOCAB_FOLDER / f"{name}.parquet"
    known = {value: row for row, value in enumerate(pq.read_table(file)["value"].to_pylist())} if file.exists() else {}
    numbers = [known.get(value, UNKNOWN_CATEGORY) for value in dataset.vocab[name]]
    return np.array(numbers, dtype=np.int32)
