"""Maximum-inner-product search over a run's item vectors: exact here, approximate in `ivf.py`.

`ksa index` writes `index/`: the vectors as safetensors and a manifest that ties them to the run. FAISS builds its flat
index from them at load, so no file of FAISS's own format is ever read. A run without `index/` is searched exactly by
torch, in memory; `Recommender` says which.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recsys_ksa.errors import MissingPackageError, RunError
from recsys_ksa.model.fingerprint import vectors_hash
from recsys_ksa.retrieval.popularity_column import PopularityColumn
from recsys_ksa.schema import UNKNOWN_ITEM

FORMAT_VERSION = 1
ROWS_AT_ONCE = 2048
"""Rows gathered at once: they stay in a core's cache until they are multiplied."""
VECTORS_FILE = "item_vectors.safetensors"
MANIFEST_FILE = "manifest.json"

IndexKind = Literal["exact", "ivf"]
"""How items are searched: all of them, or those in the lists near by (`recsys_ksa.retrieval.ivf`)."""
Found = tuple[NDArray[np.int64], NDArray[np.float32]]
"""(item_index, score), best first; fewer than asked where fewer items may be returned."""


class Index(Protocol):
    """Searches item vectors, row = item_index; row 0 (unknown) is never returned."""

    version: str
    kind: str
    recall: float
    """Share of the 100 best items that it finds, as measured when it was loaded; 1: exact."""

    def search(self, vector: NDArray[np.float32], k: int, exclude: NDArray[np.integer] | None = None) -> Found:
        """Return the k items of largest inner product with `vector` [E], none of `exclude` among them."""
        ...


def row_products(
    vectors: NDArray[np.float32], rows: NDArray[np.integer], vector: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the inner products of `vector` [E] with some rows of `vectors` [I, E]; of tens of thousands too."""
    products = np.empty(len(rows), np.float32)
    gathered = np.empty((min(ROWS_AT_ONCE, len(rows)), vectors.shape[1]), np.float32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        # mode "raise" would copy the rows once more
        some = np.take(vectors, part, axis=0, out=gathered[: len(part)], mode="clip")
        np.dot(some, vector, out=products[start : start + len(part)])
    return products


@dataclass(frozen=True)
class StoredVectors:
    """What an index folder has searched: float32 [I, E (+ 1)], popularity added; and its hash."""

    vectors: torch.Tensor
    version: str


class TorchIndex:
    """Exact search in memory by torch."""

    kind = "exact, in memory"
    recall = 1.0

    def __init__(self, vectors: torch.Tensor) -> None:
        """Hold `vectors`, float32 [I, E]."""
        self.vectors = vectors.detach().to(torch.float32)
        self.version = vectors_hash(vectors)

    def search(self, vector: NDArray[np.float32], k: int, exclude: NDArray[np.integer] | None = None) -> Found:
        """See `Index.search`."""
        scores = self.vectors @ torch.from_numpy(vector).to(self.vectors)
        scores[UNKNOWN_ITEM] = -torch.inf
        if exclude is not None and len(exclude):
            scores[torch.from_numpy(np.asarray(exclude, dtype=np.int64)).to(scores.device)] = -torch.inf
        values, rows = scores.topk(min(k, len(scores)))
        kept = values > -torch.inf
        return rows[kept].cpu().numpy(), values[kept].cpu().numpy()


class FaissIndex:
    """Exact search by FAISS (`IndexFlatIP`)."""

    kind = "FAISS flat inner product"
    recall = 1.0

    def __init__(self, vectors: torch.Tensor, version: str) -> None:
        """Build from `vectors`, float32 [I, E]."""
        try:
            import faiss
        except ImportError as error:
            raise MissingPackageError(
                f"index: expected the package faiss-cpu, got: {error}. Install it, or remove the run's index/ folder "
                "to search in memory."
            ) from error
        self._faiss = faiss
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors.numpy()))  # pyright: ignore[reportCallIssue]
        self.version = version

    def search(self, vector: NDArray[np.float32], k: int, exclude: NDArray[np.integer] | None = None) -> Found:
        """See `Index.search`. Parameters go with the call: the index itself is shared between threads."""
        faiss = self._faiss
        hidden = np.append(np.asarray([] if exclude is None else exclude, dtype=np.int64), UNKNOWN_ITEM)
        batch = faiss.IDSelectorBatch(hidden)
        chosen = faiss.SearchParameters(sel=faiss.IDSelectorNot(batch))  # pyright: ignore[reportCallIssue]
        scores, rows = self._index.search(  # pyright: ignore[reportCallIssue]
            np.ascontiguousarray(vector, dtype=np.float32)[None], min(k, self._index.ntotal), params=chosen
        )
        kept = rows[0] >= 0
        return rows[0][kept], scores[0][kept]


def write_index(
    folder: Path, vectors: torch.Tensor, release: str, column: PopularityColumn | None = None
) -> dict[str, object]:
    """Write item vectors, float32 [I, E], and the manifest that ties them to `release`; returns the manifest.

    The popularity column of a run that has one is a file of its own, with its own hash and time in the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vectors = vectors.detach().to("cpu", torch.float32).contiguous()
    save_file({"item_vectors": vectors}, folder / VECTORS_FILE)
    manifest: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "kind": "flat-inner-product",
        "num_items": vectors.shape[0],
        "dim": vectors.shape[1],
        "vectors_hash": vectors_hash(vectors),
        "release_hash": release,
    }
    if column is not None:
        column.save(folder)
        manifest |= {"popularity_as_of": column.as_of, "popularity_hash": column.hash}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_vectors(
    folder: Path, vectors: torch.Tensor, release: str, column: PopularityColumn | None = None
) -> StoredVectors:
    """Return what the index of a run searches, checked against the run.

    Args:
        folder: the run's `index/`.
        vectors: the item vectors the run's weights give, float32 [I, E].
        release: the run's release hash.
        column: the folder's own, for a run with a popularity bias.

    Raises:
        RunError: a file is missing or damaged, or the index belongs to other weights.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        stored = load_file(folder / VECTORS_FILE)["item_vectors"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError, KeyError) as error:
        raise RunError(f"{folder}: expected an index, got: {error}. Run `ksa index` again.") from error
    version = vectors_hash(stored)
    if not isinstance(manifest, dict) or version != manifest.get("vectors_hash"):
        raise RunError(f"{folder}: its vectors are not those its manifest names. Run `ksa index` again.")
    if manifest.get("release_hash") != release or version != vectors_hash(vectors):
        raise RunError(
            f"{folder}: expected the index of release {release[:12]}, got one of "
            f"{str(manifest.get('release_hash'))[:12]}. Run `ksa index` again."
        )
    if column is None:
        return StoredVectors(stored, version)
    found = (manifest.get("popularity_as_of"), manifest.get("popularity_hash"))
    if found != (column.as_of, column.hash) or len(column.gain) != len(stored):
        raise RunError(f"{folder}: its popularity column is not the one its manifest names. Run `ksa index` again.")
    stored = column.added_to(stored)
    return StoredVectors(stored, vectors_hash(stored))
