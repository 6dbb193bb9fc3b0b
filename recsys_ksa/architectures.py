"""`model.architecture` -> the network of that name."""

from recsys_ksa.baselines.chunk_tokens import MeanPooled, SegmentTokens
from recsys_ksa.baselines.hstu import HSTU
from recsys_ksa.baselines.sasrec import SASRec
from recsys_ksa.config import ModelConfig, RunConfig
from recsys_ksa.errors import ConfigError
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.network import Network
from recsys_ksa.model.scoring import ScoringNetwork

ARCHITECTURES: dict[str, type[ScoringNetwork]] = {
    "ksa": Network,
    "sasrec": SASRec,
    "hstu": HSTU,
    "mean-pooled": MeanPooled,
    "segment-tokens": SegmentTokens,
}


def build_network(config: ModelConfig, features: FeatureSchema) -> ScoringNetwork:
    """Return the config's network with random parameters.

    Raises:
        ConfigError: the config contradicts itself or the data set.
    """
    return ARCHITECTURES[config.architecture](config, features)


def check_length(config: RunConfig, network: ScoringNetwork) -> None:
    """Refuse to train on more events than an architecture with positions of its own can read.

    Raises:
        ConfigError: with both lengths.
    """
    if network.max_length is not None and config.data.max_length > network.max_length:
        raise ConfigError(
            f"data.max_length: expected at most model.max_positions {network.max_length} with architecture "
            f"{config.model.architecture}, got {config.data.max_length}. Raise the one or lower the other."
        )
