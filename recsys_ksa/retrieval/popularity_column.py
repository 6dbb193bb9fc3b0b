"""The index column of popularity: what each item's score gains by how popular it is as of a time.

Weights stay, the column ages: `ksa index RUN --popularity-as-of TIME` writes it anew, as a file of its own with a hash
of its own, and nothing else changes it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recsys_ksa.data.popularity import DayCounts
from recsys_ksa.errors import RunError
from recsys_ksa.model.fingerprint import vectors_hash
from recsys_ksa.model.network import Network
from recsys_ksa.model.popularity import Popularity, day_of

COLUMN_FILE = "popularity.safetensors"


@dataclass(frozen=True)
class PopularityColumn:
    """gain: float32 [I], added to the item bias; as_of: Unix seconds, of which the whole days before count."""

    gain: Tensor
    as_of: int

    @property
    def hash(self) -> str:
        """SHA-256 of the gains, 64 hex digits."""
        return vectors_hash(self.gain)

    def added_to(self, vectors: Tensor) -> Tensor:
        """Return item vectors [I, E + 1] with the gains in their last column; a copy."""
        return torch.cat((vectors[:, :-1], vectors[:, -1:] + self.gain[:, None].to(vectors)), dim=1)

    def save(self, folder: Path) -> None:
        """Write the column into an index folder."""
        save_file({"gain": self.gain.contiguous()}, folder / COLUMN_FILE, {"as_of": str(self.as_of)})

    @staticmethod
    def load(folder: Path) -> "PopularityColumn":
        """Read the column of an index folder.

        Raises:
            RunError: it is missing or damaged.
        """
        try:
            with safe_open(folder / COLUMN_FILE, "pt") as file:
                return PopularityColumn(file.get_tensor("gain"), int(file.metadata()["as_of"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{folder / COLUMN_FILE}: expected the popularity of each item, got: {error}. Run `ksa index` again."
            ) from error


def popularity_column(network: Network, counts: DayCounts, as_of: int | None = None) -> PopularityColumn:
    """Return the column of a network with a popularity bias; `as_of` None: as of the last event counted.

    Raises:
        DataError: the counts hold no event in the days before `as_of`.
    """
    assert network.popularity_bias is not None
    time = counts.last_time if as_of is None else as_of
    counts.check_time(time)
    shares = Popularity(counts, network.features.num_items).log_shares(day_of(torch.tensor(time)))
    with torch.no_grad():
        gain = network.popularity_bias(shares.to(network.start.device))
    return PopularityColumn(gain.to("cpu", torch.float32), time)
