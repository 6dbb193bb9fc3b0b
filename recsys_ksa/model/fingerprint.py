"""Content hashes of a network: what user states depend on, and what a release is made of.

A state's keys and values depend on the weights they are computed with, the config, the feature schema, the dtype and
the layout; not on the head, the own-item bias, the request time or the last block's output. Names and paths never
enter: retrained weights under an old name must not find old states. Keys at their defaults are left out, so that a new
key, whose default is what was done before, leaves older runs and their states as they are.
"""

import hashlib
import json

import torch
from torch import Tensor

from recsys_ksa.model.network import Network
from recsys_ksa.model.scoring import ScoringNetwork

STATE_LAYOUT = 1
"""Raised when the meaning of a stored row changes."""
ITEM_TABLES = (".item.weight", ".candidate_item.weight")
_ANSWER_ONLY = (
    "start",
    "norm.",
    "head.",
    "log_temperature",
    "item_bias",
    "popularity_bias.",
    "centre.",
    "own_items.",
    "request.",
    "question.",
)


def state_fingerprint(network: ScoringNetwork, num_base_items: int | None = None) -> str:
    """Return the SHA-256, as 64 hex digits, of all that a user state's rows depend on; "none" without states.

    Args:
        num_base_items: item rows that count, the unknown item's included; those after them were appended to a run, so
            states of users who never met them stay what they are. None: all.
    """
    if not isinstance(network, Network):
        return "none"
    last = f"blocks.{len(network.blocks) - 1}."
    skipped = _ANSWER_ONLY + tuple(f"{last}{part}" for part in ("output", "gain", "up", "down", "event.", "summary."))
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith(skipped)}
    for kind in ("event", "summary"):
        projection = getattr(network.blocks[-1], kind)
        if projection is not None:
            weights |= {f"{last}{kind}.{name}": value for name, value in projection.row_weights().items()}
    base = num_base_items or network.features.num_items
    about = {
        "layout": STATE_LAYOUT,
        "config": network.config.model_dump(mode="json", exclude_defaults=True),
        "features": {**network.features.as_dict(), "num_items": base},
        "dtype": str(network.state_dtype),
        **_items_read(network, 0, base),
    }
    return _hash(about, weights | _item_rows(network, 0, base))


def appended_hash(network: Network, first: int, num_items: int) -> str:
    """Return the SHA-256 of what states read of item rows `first` to `num_items`, the last not included."""
    return _hash({"first": first, **_items_read(network, first, num_items)}, _item_rows(network, first, num_items))


def _item_rows(network: Network, first: int, stop: int) -> dict[str, Tensor]:
    """Return these rows of the tables that have one for each item."""
    tables = network.state_dict()
    return {name: value[first:stop] for name, value in tables.items() if name.endswith(ITEM_TABLES)}


def _items_read(network: Network, first: int, stop: int) -> dict[str, dict[str, str]]:
    """Return the hashes of these items' columns, by name."""
    features = network.features
    found = {"side": {name: _array_hash(side.category[first:stop].tobytes()) for name, side in features.side.items()}}
    lists, vectors = {}, {}
    for name, each in features.multi.items():
        start, end = each.offsets[[first, stop]]
        lists[name] = _array_hash((each.offsets[first : stop + 1] - start).tobytes() + each.index[start:end].tobytes())
    for name, each in features.vectors.items():
        vectors[name] = _array_hash(each[first:stop].tobytes())
    return found | ({"lists": lists, "vectors": vectors} if lists or vectors else {})


def release_hash(network: ScoringNetwork) -> str:
    """Return the SHA-256, as 64 hex digits, of everything answers depend on."""
    about = {
        "config": network.config.model_dump(mode="json", exclude_defaults=True),
        "features": network.features.as_dict(),
    }
    return _hash(about, network.state_dict())


def vectors_hash(vectors: Tensor) -> str:
    """Return the SHA-256, as 64 hex digits, of item vectors as little-endian float32."""
    return _array_hash(vectors.detach().to("cpu", torch.float32).contiguous().view(-1).numpy().data)


def _hash(about: dict[str, object], weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(weights):
        value = weights[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Not a copy as bytes: making one of a large table would keep Python from all other threads.
        digest.update(value.view(torch.uint8).view(-1).numpy().data if value.dim() else str(value.item()).encode())
    return digest.hexdigest()


def _array_hash(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
