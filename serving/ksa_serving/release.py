"""What is served: one model with the names by which its answers can be traced.

Loading one imports torch; this module does not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ksa_serving.messages import Parity
from ksa_serving.models import Model
from recsys_ksa.errors import ConfigError, RunError
from recsys_ksa.order import TieKind

if TYPE_CHECKING:
    from recsys_ksa.recommender import Recommender
    from recsys_ksa.retrieval.index import TorchIndex

Clock = Literal["unix", "relative", "ordinal"]


@dataclass(frozen=True)
class Release:
    """A model and what identifies it."""

    model: Model
    tie: TieKind
    clock: Clock
    model_version: str
    """Hash of weights and everything else an answer depends on, but the index."""
    index_version: str
    state_fingerprint: str
    """Hash of what a state depends on; states of another are never used."""
    longest_trained_history: int | None
    """Events; longer histories are answered and flagged."""
    index_source: str = "memory"
    """Where retrieval comes from, for people."""
    name: str = ""
    """The run's folder, for people."""


def load_release(
    run: Path,
    index: Literal["exact", "ivf"] = "exact",
    cold_parity: Parity = "exact",
    device: str = "cpu",
    pool_bytes: int | None = None,
) -> Release:
    """Load a run or bundle for serving.

    Args:
        index: how items are searched: as the run says, exactly, or by an approximate index that passes the recall gate.
        cold_parity: how its states are kept cold.
        device: where the network runs, and the exact search; on another than the CPU states are kept in pages.
        pool_bytes: of those pages.

    Raises:
        RunError: it is damaged, its index belongs to other weights, or misses too many items.
        ConfigError: the device is not there, or the run's states cannot be kept in pages.
    """
    import torch

    from ksa_serving.library_model import LibraryModel
    from recsys_ksa.bundle import BUNDLE_FILE, check_bundle
    from recsys_ksa.recommender import Recommender

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: expected a GPU that PyTorch can use, got none. Set device to cpu, or see `ksa doctor`."
        )
    if (run / BUNDLE_FILE).exists():
        check_bundle(run)
    recommender = Recommender.load(run, device=device, pool_bytes=pool_bytes)
    if device != "cpu" and index == "exact":
        recommender.index = _on_device(recommender, device)
    if index == "ivf":
        from ksa_serving.ivf_index import IvfIndex

        recommender.index = IvfIndex(recommender.item_vectors, recommender.index.version)
        check_recall(recommender)
    info = recommender.run.info
    model = LibraryModel(recommender, cold_parity)
    model.warm_up(WARM_QUESTIONS)
    return Release(
        model=model,
        tie=info.tie,
        clock=info.clock,
        model_version=info.release_hash,
        index_version=recommender.index.version,
        state_fingerprint=recommender.fingerprint,
        longest_trained_history=info.longest_trained_history,
        index_source=recommender.index.kind,
        name=run.name,
    )


def _on_device(recommender: "Recommender", device: str) -> "TorchIndex":
    """Return exact search on a device, by the vectors and under the version of the run's index."""
    import torch

    from recsys_ksa.retrieval.index import TorchIndex

    index = TorchIndex(torch.from_numpy(recommender.item_vectors).to(device))
    index.version = recommender.index.version
    return index


WARM_QUESTIONS = 64
"""Users up to which batches of every size are compiled before a release is served."""
MIN_RECALL = 0.98
"""Of an approximate index against exact search, at 100 items; a release below it is not loaded."""


def check_recall(recommender: "Recommender", num_queries: int = 1000, seed: int = 0) -> float:
    """Return the index's recall@100 on user vectors drawn around item vectors.

    Raises:
        RunError: it is below `MIN_RECALL`.
    """
    import numpy as np
    import torch

    from recsys_ksa.retrieval.index import TorchIndex

    vectors = recommender.item_vectors
    exact = TorchIndex(torch.from_numpy(vectors))
    draw = np.random.default_rng(seed)
    rows = draw.integers(1, len(vectors), num_queries)
    near = vectors[rows] + draw.normal(0, 0.5 / vectors.shape[1] ** 0.5, (num_queries, vectors.shape[1]))
    found = hits = 0
    for query in near.astype(np.float32):
        wanted, _ = exact.search(query, 100)
        got, _ = recommender.index.search(query, 100)
        found += len(wanted)
        hits += len(np.intersect1d(wanted, got))
    recall = hits / max(1, found)
    if recall < MIN_RECALL:
        raise RunError(
            f"{recommender.run.path}: index: expected recall@100 of at least {MIN_RECALL} against exact search, got "
            f"{recall:.4f}. Serve it with --index exact."
        )
    return recall
