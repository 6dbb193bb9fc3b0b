"""What is served: one model with the names by which its answers can be traced.

Loading one imports torch; this module does not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ksa_serving.messages import Parity
from ksa_serving.models import Model
from recsys_ksa.errors import ConfigError
from recsys_ksa.order import TieKind

if TYPE_CHECKING:
    from recsys_ksa.recommender import Recommender
    from recsys_ksa.retrieval.index import IndexKind, TorchIndex

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
    index_recall: float = 1.0
    """Of its index against exact search, at 100 items, as measured when it was loaded."""
    name: str = ""
    """The run's folder, for people."""


def load_release(
    run: Path,
    index: "IndexKind" = "exact",
    cold_parity: Parity = "exact",
    device: str = "cpu",
    pool_bytes: int | None = None,
) -> Release:
    """Load a run or bundle for serving.

    Args:
        index: how items are searched: exactly, or by the approximate index that `ksa index --kind ivf` has put into it.
        cold_parity: how its states are kept cold.
        device: where the network runs, and the exact search; on another than the CPU states are kept in pages.
        pool_bytes: of those pages.

    Raises:
        RunError: it is damaged, its index is missing, belongs to other weights, or misses too many items.
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
    recommender = Recommender.load(run, device=device, pool_bytes=pool_bytes, index=index)
    if device != "cpu" and index == "exact":
        recommender.index = _on_device(recommender, device)
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
        index_recall=recommender.index.recall,
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
