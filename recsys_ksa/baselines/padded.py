"""A network that reads whole histories as padded rows, a pack of users of like length at a time.

Shapes: U users of a pack, N events of its longest history, T events of the batch, Q questions, E model dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from recsys_ksa.model.scoring import ScoringNetwork

if TYPE_CHECKING:
    from recsys_ksa.data.batches import Batch

MAX_PAIRS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Most (query, key) pairs of a pack in one head, one user at least: bounds memory, which is quadratic in N."""


@dataclass(frozen=True)
class Pack:
    """Some users' histories, one row each, padded on the right."""

    row: Tensor
    """int64 [U, N], row in T; 0 in padding."""
    is_event: Tensor
    """bool [U, N]."""
    position: Tensor
    """int64 [U, N], true index of each event in its history."""
    timestamp: Tensor
    """int64 [U, N]."""

    def take(self, rows: Tensor) -> Tensor:
        """Return each event's row of [T, E], [U, N, E]; some row in padding."""
        # Not rows[self.row]: its gradient on CUDA adds equal indices, which padding is, one after the other.
        return rows.index_select(0, self.row.flatten()).unflatten(0, self.row.shape)


class PaddedNetwork(ScoringNetwork):
    """Reads each history at once. `read` is the architecture; no row may look at a later one."""

    def forward(self, batch: "Batch", attention_impl: str = "auto") -> Tensor:
        """Return one user vector a question, as `ScoringNetwork.forward`; `attention_impl` has no meaning here.

        The request time enters the query and the residual of the last layer, as in `Network`.
        """
        known = batch.question_row >= 0
        told = self.told(batch.told)
        hidden = self.starts(batch.num_questions, told)
        if batch.num_events:
            lengths = batch.offsets.diff()
            events = self.embed(batch.item_index, batch.event_type, batch.gap_bucket, lengths, batch.features)
            row = batch.question_row.clamp(min=0)
            bucket = torch.zeros_like(batch.item_index)
            bucket[row[known]] = batch.request_bucket[known]
            asked = None if self.request is None else self.request(bucket).to(events.dtype)
            if told is not None:
                spread = torch.zeros_like(events).index_put((row[known],), told[known].to(events.dtype))
                asked = spread if asked is None else asked + spread
            read = torch.zeros_like(events)
            for pack in packs(batch):
                found = self.read(pack.take(events), None if asked is None else pack.take(asked), pack)
                read = read.index_put((pack.row[pack.is_event],), found[pack.is_event].to(read.dtype))
            hidden = torch.where(known[:, None], read[row], hidden)
        return self.user_vectors(hidden)

    def read(self, events: Tensor, asked: Tensor | None, pack: Pack) -> Tensor:
        """Return what each event's row knows after it, [U, N, E].

        Args:
            events: inputs, [U, N, E].
            asked: what the request time, and what else a question tells, add to each row's query in the last layer,
                [U, N, E].
            pack: where the rows sit.
        """
        raise NotImplementedError


def packs(batch: "Batch") -> Iterator[Pack]:
    """Cut the batch's users, longest first, into packs within `MAX_PAIRS`; users without events are left out.

    No user of a pack has less than half the events of its longest: at most three quarters of its pairs are padding.
    """
    lengths = batch.offsets.diff()
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    max_pairs, start = MAX_PAIRS[lengths.device.type], 0
    while start < len(sizes) and sizes[start]:
        longest = sizes[start]
        stop = start + max(1, max_pairs // longest**2)
        stop = start + sum(2 * size >= longest for size in sizes[start:stop])
        users = order[start:stop]
        column = torch.arange(longest, device=lengths.device)
        is_event = column < lengths[users, None]
        row = torch.where(is_event, batch.offsets[users, None] + column, 0)
        yield Pack(row, is_event, batch.first_position[users, None] + column, batch.timestamp[row])
        start = stop


def causal(pack: Pack) -> Tensor:
    """Return which event each event sees: itself and all before it. bool [U, N, N]."""
    size = pack.row.shape[1]
    return torch.ones(size, size, dtype=torch.bool, device=pack.row.device).tril().expand(len(pack.row), -1, -1)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return softmax attention, [U, H, N, D] (keys and values: maybe fewer heads); visible: bool [U, N, N], or causal.

    Without cuDNN, which plans anew for every shape, and every pack has its own: that took most of a training step.
    """
    mask = None if visible is None else visible[:, None]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
