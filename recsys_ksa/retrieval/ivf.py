"""Approximate search for large catalogues: FAISS IVF over a run's item vectors, its lists made once by `ksa index`.

Each item is in one of about 4 * sqrt(I) lists, the one whose centroid is nearest; a search looks into the `probes`
nearest lists. `ksa index RUN --kind ivf` trains the centroids and stores them with each item's list in `index/`:

    ivf.safetensors  centroids float32 [L, E], list_index int32 [I]
    ivf.json         `IvfRecord`: what they belong to, and how much of exact search is found by them

Whoever loads them trains nothing and assigns nothing, and reads no file of FAISS's own format.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from recsys_ksa.config import Strict
from recsys_ksa.errors import MissingPackageError, RunError
from recsys_ksa.model.scoring import ScoringNetwork
from recsys_ksa.retrieval.index import Found, StoredVectors, read_vectors
from recsys_ksa.retrieval.popularity_column import PopularityColumn
from recsys_ksa.retrieval.recall import DEPTH, MIN_RECALL, NUM_PROBED, drawn_questions, recall_of_each
from recsys_ksa.schema import UNKNOWN_ITEM

LISTS_FILE = "ivf.safetensors"
RECORD_FILE = "ivf.json"
PROBES = 32
SEED = 20
"""Of the clustering, so that the same vectors give the same lists."""
ROUNDS = 5
ITEMS_A_LIST = 64
"""Read in each round of training at most: FAISS takes 10 rounds and 256, and finds .001 more."""
FEWEST_ITEMS_A_LIST = 39
"""FAISS warns below."""


class IvfRecord(Strict):
    """ivf.json."""

    vectors_hash: str
    """SHA-256 of the vectors that are searched, float32."""
    lists_hash: str
    """SHA-256 of ivf.safetensors."""
    probes: PositiveInt
    """Lists looked into."""
    recall: NonNegativeFloat
    """At 100 items against exact search, mean of the questions."""
    num_questions: PositiveInt


@dataclass(frozen=True)
class IvfLists:
    """centroids: float32 [L, E]; list_index: int32 [I], the list of each item."""

    centroids: Tensor
    list_index: Tensor


class IvfIndex:
    """`recsys_ksa.retrieval.index.Index` by FAISS `IndexIVFFlat`, inner product.

    Args:
        vectors: float32 [I, E]; row 0 (unknown) is never returned.
        lists: their lists, within range.
        version: of vectors, lists and probes.
        probes: lists looked into, at most all.

    Raises:
        MissingPackageError: faiss is not installed.
    """

    def __init__(self, vectors: Tensor, lists: IvfLists, version: str, probes: int = PROBES):
        self._faiss = faiss = _faiss()
        num_lists, dim = lists.centroids.shape
        quantizer = faiss.IndexFlatIP(dim)
        quantizer.add(lists.centroids.numpy())  # pyright: ignore[reportCallIssue]
        self._index = faiss.IndexIVFFlat(quantizer, dim, num_lists, faiss.METRIC_INNER_PRODUCT)
        self._index.is_trained = True
        rows, list_of = vectors.contiguous().numpy(), lists.list_index.numpy().astype(np.int64)
        self._index.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(list_of))
        self._probes = probes
        self.kind = f"FAISS IVF, {probes} of {num_lists} lists"
        self.version = version
        self.recall = math.nan  # not measured yet

    def search(self, vector: NDArray[np.float32], k: int, exclude: NDArray[np.integer] | None = None) -> Found:
        """Return about the k items of largest inner product with `vector` [E], none of `exclude` among them.

        Parameters go with the call: the index is shared between threads and never changes.
        """
        faiss = self._faiss
        shown = np.ones(self._index.ntotal, dtype=bool)
        shown[UNKNOWN_ITEM] = False
        if exclude is not None:
            shown[exclude] = False
        # A bit an item: a set of the 79,000 items of a long history took longer to make than the search.
        bits = np.packbits(shown, bitorder="little")
        chosen = faiss.SearchParametersIVF(  # pyright: ignore[reportCallIssue]
            sel=faiss.IDSelectorBitmap(bits),  # pyright: ignore[reportCallIssue]
            nprobe=self._probes,  # pyright: ignore[reportCallIssue]
        )
        scores, rows = self._index.search(  # pyright: ignore[reportCallIssue]
            np.ascontiguousarray(vector, dtype=np.float32)[None], min(k, self._index.ntotal), params=chosen
        )
        kept = rows[0] >= 0
        return rows[0][kept], scores[0][kept]


def train_lists(vectors: Tensor, dim: int) -> IvfLists:
    """Return lists of items, float32 [I, E (+ 1)], by nearness; the same vectors give the same lists.

    Biases would pull items of all directions into a few lists, so the first `dim` columns alone decide; a list's
    centroid has the largest bias in it, for a search to weigh the best that may lie there.

    Raises:
        MissingPackageError: faiss is not installed.
    """
    faiss = _faiss()
    rows = vectors[:, :dim].contiguous().numpy()
    num_lists = max(1, min(int(4 * len(rows) ** 0.5), len(rows) // FEWEST_ITEMS_A_LIST))
    clusters = faiss.Clustering(dim, num_lists)
    clusters.niter, clusters.seed, clusters.spherical = ROUNDS, SEED, True
    clusters.max_points_per_centroid = ITEMS_A_LIST
    quantizer = faiss.IndexFlatIP(dim)
    clusters.train(rows, quantizer)  # pyright: ignore[reportCallIssue]
    _, nearest = quantizer.search(rows, 1)  # pyright: ignore[reportCallIssue]
    centroids = torch.from_numpy(faiss.vector_to_array(clusters.centroids).reshape(num_lists, dim))
    list_index = torch.from_numpy(nearest[:, 0])
    biases = vectors[:, dim:]
    largest = biases.amin(0).repeat(num_lists, 1)
    largest.scatter_reduce_(0, list_index[:, None].expand_as(biases), biases, "amax")
    return IvfLists(torch.cat((centroids, largest), dim=1), list_index.int())


def write_ivf(folder: Path, network: ScoringNetwork, stored: StoredVectors, probes: int = PROBES) -> IvfRecord:
    """Train the lists of a run's vectors, hold them against exact search, and write them into its index folder.

    Args:
        folder: the run's `index/`.
        network: the run's.
        stored: what the folder has searched.
        probes: lists looked into.

    Raises:
        RunError: they miss too many items; nothing is written.
        MissingPackageError: faiss is not installed.
    """
    lists = train_lists(stored.vectors, network.config.dim)
    probes = min(probes, len(lists.centroids))
    index = IvfIndex(stored.vectors, lists, "", probes)
    shares = recall_of_each(index, stored.vectors, drawn_questions(network))
    content = save({"centroids": lists.centroids, "list_index": lists.list_index})
    record = IvfRecord(
        vectors_hash=stored.version,
        lists_hash=hashlib.sha256(content).hexdigest(),
        probes=probes,
        recall=_checked_recall(folder.parent, shares),
        num_questions=len(shares),
    )
    (folder / LISTS_FILE).write_bytes(content)
    (folder / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record


def load_ivf(
    folder: Path, network: ScoringNetwork, vectors: Tensor, release: str, column: PopularityColumn | None = None
) -> IvfIndex:
    """Load the approximate index of a run, check it against the run, and hold it against exact search once more.

    Args:
        folder: the run's `index/`.
        network: the run's.
        vectors, release, column: as `read_vectors` takes them.

    Raises:
        RunError: it is missing or damaged, belongs to other weights, or misses too many items.
        MissingPackageError: faiss is not installed.
    """
    again = f"Run `ksa index {folder.parent} --kind ivf`."
    if not (folder / RECORD_FILE).exists():
        raise RunError(f"{folder / RECORD_FILE}: expected an approximate index, got no such file. {again}")
    stored = read_vectors(folder, vectors, release, column)
    try:
        record = IvfRecord.model_validate_json((folder / RECORD_FILE).read_bytes())
        content = (folder / LISTS_FILE).read_bytes()
        found = load(content)
        lists = IvfLists(found["centroids"], found["list_index"])
    except (OSError, ValidationError, SafetensorError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{folder}: expected an approximate index, got: {reason}. {again}") from error
    if (digest := hashlib.sha256(content).hexdigest()) != record.lists_hash:
        raise RunError(
            f"{folder / LISTS_FILE}: expected SHA-256 {record.lists_hash[:12]} as {RECORD_FILE} says, got "
            f"{digest[:12]}. {again}"
        )
    if record.vectors_hash != stored.version:
        raise RunError(
            f"{folder / RECORD_FILE}: expected lists of the vectors {stored.version[:12]}, got those of "
            f"{record.vectors_hash[:12]}. {again}"
        )
    _check_lists(folder / LISTS_FILE, lists, record.probes, stored.vectors.shape, again)
    index = IvfIndex(stored.vectors, lists, f"{stored.version}-ivf-{record.probes}-{digest[:16]}", record.probes)
    questions = drawn_questions(network, NUM_PROBED)
    index.recall = _checked_recall(folder.parent, recall_of_each(index, stored.vectors, questions))
    return index


def _checked_recall(run: Path, shares: NDArray[np.float64]) -> float:
    """Return the mean of questions' recall, which must be enough."""
    recall = float(shares.mean())
    if recall < MIN_RECALL:
        raise RunError(
            f"{run}: approximate index: expected recall@{DEPTH} of at least {MIN_RECALL} against exact search, got "
            f"{recall:.4f}. Run `ksa index {run} --kind ivf` with more --probes, or search exactly."
        )
    return recall


def _check_lists(file: Path, lists: IvfLists, probes: int, shape: torch.Size, again: str) -> None:
    """Refuse what FAISS would read or write out of bounds with.

    Args:
        file: for the message.
        shape: of the vectors.
    """
    num_items, dim = shape
    centroids, list_index = lists.centroids, lists.list_index
    if (centroids.dtype, list_index.dtype) != (torch.float32, torch.int32):
        raise RunError(
            f"{file}: expected centroids of float32 and list_index of int32, got {centroids.dtype} and "
            f"{list_index.dtype}. {again}"
        )
    num_lists = len(centroids) if centroids.dim() == 2 else 0
    if not num_lists or centroids.shape[1] != dim or list_index.shape != (num_items,) or probes > num_lists:
        raise RunError(
            f"{file}: expected centroids [L, {dim}], list_index [{num_items}] and at most L probes, got "
            f"{list(centroids.shape)}, {list(list_index.shape)} and {probes}. {again}"
        )
    if not bool(centroids.isfinite().all()):
        raise RunError(f"{file}: expected finite centroids, got others. {again}")
    low, high = (int(value) for value in list_index.aminmax())
    if low < 0 or high >= num_lists:
        raise RunError(f"{file}: expected lists 0 to {num_lists - 1}, got {low} to {high}. {again}")


def _faiss():
    try:
        import faiss
    except ImportError as error:
        raise MissingPackageError(
            f"approximate index: expected the package faiss-cpu, got: {error}. Install it, or search exactly."
        ) from error
    return faiss
