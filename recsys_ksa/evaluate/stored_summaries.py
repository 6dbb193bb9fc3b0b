"""What the network would answer with other summaries in store: zeros, or another user's of the same age.

A replay rebuilds keys and values of recent events from the stored summaries and the raw events of the stacked window.
So a pass in which every layer's summaries are replaced answers as a user would be answered whose record holds the wrong
ones: what the answer loses is what old history gave beyond the stacked window. Item counts stay the user's own.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from recsys_ksa.data.assemble import questions_batch
from recsys_ksa.data.batches import Batch
from recsys_ksa.data.jagged_arrays import offsets_of, ragged_arange
from recsys_ksa.features import EventFeatures
from recsys_ksa.model.network import Network, Rows
from recsys_ksa.model.place import num_summaries, place_histories
from recsys_ksa.model.scoring import ScoringNetwork

if TYPE_CHECKING:
    from recsys_ksa.config import ModelConfig
    from recsys_ksa.data.dataset import Histories

Memory = Literal["own", "zeroed", "shuffled"]
"""Whose summaries a pass reads: the user's own, zeros, or another user's."""


def has_summaries(config: "ModelConfig") -> bool:
    """Return whether the model keeps summaries at all."""
    return config.architecture == "ksa" and num_summaries(config) > 0 and "summary" in config.layer_kinds


@torch.no_grad()
def stored_summaries(
    network: ScoringNetwork, histories: "Histories", users: NDArray[np.int64], batch: Batch, memory: Memory, impl: str
) -> list[Rows | None] | None:
    """Return each layer's rows to read in place of those computed, in the order `Network.encode` takes as `fixed`.

    `shuffled` gives chunk j of a user the summaries of chunk j of the next longer history (of the second longest to the
    longest; zeros where that one has no such chunk), computed from that history alone.

    Args:
        network: in eval mode.
        histories: the data set's, two users at least.
        users: rows of the batch's users, int64 [U].
        batch: their events from the first on.
        memory: whose summaries to return; None is returned for `own`.
        impl: implementation of summary attention.
    """
    if memory == "own":
        return None
    assert isinstance(network, Network)
    config, device = network.config, network.start.device
    closed = batch.offsets.diff().cpu().numpy() // config.chunk_size
    counts = closed * config.summaries_per_chunk
    shape = (int(counts.sum()), 2, config.num_kv_heads, config.head_dim)
    zeros = torch.zeros(shape, dtype=network.dtype, device=device)
    kinds = config.layer_kinds
    if memory == "zeroed" or not len(zeros):
        return [Rows(zeros[:0], zeros) if kind == "summary" else None for kind in kinds]

    strangers = next_longer(histories.lengths)[users]
    theirs = np.minimum(closed, histories.lengths[strangers] // config.chunk_size)
    place = torch.from_numpy(
        ragged_arange(offsets_of(counts)[:-1], theirs * config.summaries_per_chunk),
    ).to(device)
    encoded = _encode(network, histories, strangers, theirs * config.chunk_size, impl)
    return [
        Rows(zeros[:0], zeros.index_copy(0, place, rows.summaries)) if kind == "summary" else None
        for kind, rows in zip(kinds, encoded)
    ]


def next_longer(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each user the row of the one with the next longer (or an equally long) history, int64 [U].

    The longest history's is the second longest.
    """
    order = np.argsort(lengths, kind="stable")
    other = np.empty_like(order)
    other[order[:-1]] = order[1:]
    other[order[-1]] = order[-2]
    return other


def _encode(
    network: Network, histories: "Histories", users: NDArray[np.int64], cuts: NDArray[np.int64], impl: str
) -> list[Rows]:
    """Return the rows that the first `cuts` events of each user leave, a history of its own each."""
    config = network.config
    features = EventFeatures.of(config)
    batch = questions_batch(
        histories, users, np.arange(len(users)), cuts, chunk_size=config.chunk_size, features=features
    )
    batch = batch.to(network.start.device)
    place = place_histories(config, batch.offsets, batch.first_position, network.start.device, network.dtype)
    lengths = batch.offsets.diff()
    events = network.embed(batch.item_index, batch.event_type, batch.gap_bucket, lengths, batch.features)
    return network.encode(events, place, impl).rows
