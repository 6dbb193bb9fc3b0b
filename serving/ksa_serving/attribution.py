"""Which chunks of a history carried a score. Importing this imports torch.

A chunk is *left out* where the last event sees none of its rows, neither summaries nor events, in any block, and the
user's own counts lack its events: the event is passed through all blocks anew, over the rows that the state holds of
others, and the item's gain by being the user's own is computed anew (`own_item_changes.py`). What the chunk gave to
other events' rows stays, which is little beside it (`attribution_reference.py` has both; `benchmarks/explanations.py`
compares them).

Leaving out costs a row in the pass, so of a long history only those chunks are that count most: half of them by the own
counts' change, where so many have the item; the others by how much the last event's residual stream would change, block
by block. With p the attention and v the values, the output without chunk c is
(sum p v - sum over c of p v) / (1 - sum over c of p), for all chunks at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ksa_kernels.sigmoid_gate import sigmoid_gate
from ksa_serving.errors import InvalidRequestError
from ksa_serving.events import Meeting
from ksa_serving.models import ChunkReason
from ksa_serving.own_item_changes import own_item_changes
from recsys_ksa.config import LayerKind
from recsys_ksa.features import Told, request_bucket
from recsys_ksa.model.block import Block
from recsys_ksa.model.place import num_summaries
from recsys_ksa.model.rotary import Rotary, rotary_table
from recsys_ksa.model.state import LayerState, UserState, first_visible_chunk, window_start
from recsys_ksa.recommender import Recommender

LEFT_OUT = 64
"""Chunks left out at least, where the history has them."""

# Shapes: n rows seen, C chunks, V variants of the last event (the first sees all), H heads, D head dim, E model dim.


@torch.inference_mode()
def explain(
    recommender: Recommender,
    state: UserState,
    last_input: Tensor,
    met: Sequence[Meeting],
    item_id: str,
    request_time: int | None,
    most: int,
    user: Told | None = None,
) -> list[ChunkReason]:
    """Return the chunks that count: those left out first, the largest change of the score before the others.

    These are the chunks that the last event sees in some block, and those that have the item.

    Args:
        last_input: the last event's input to the first block, [1, E].
        met: the history's events of the item, in order.
        most: chunks left out at least.

    Raises:
        InvalidRequestError: the model does not know the item.
        DataError: it does not read what is told of the user.
    """
    row = recommender.run.items.index_of.get(item_id)
    if row is None:
        raise InvalidRequestError("item_id: expected an item the model knows, got another.", "unknown-item")
    if not state.num_events:
        return []
    config, num_events = recommender.network.config, state.num_events
    look = _Look(recommender, state, last_input, request_time, user)
    own_change = own_item_changes(recommender, state, row, met, request_time)
    left_out, others = _chosen(look, own_change, max(most, LEFT_OUT))
    user_vectors, attention = look.without(left_out)
    score, *without = (user_vectors @ _item_vector(recommender, row)).tolist()
    change = {chunk: score - other + own_change.get(chunk, 0.0) for chunk, other in zip(left_out.tolist(), without)}
    order = sorted(change, key=lambda chunk: -abs(change[chunk])) + others.tolist()
    window = window_start(config, config.layer_kinds[-1], num_events) // config.chunk_size
    k, seen_from, shares = config.chunk_size, int(look.chunks[0]), attention.T[order].tolist()
    return [
        ChunkReason(
            chunk * k,
            min((chunk + 1) * k, num_events) - 1,
            "counts" if chunk < seen_from else "summary" if chunk < window else "events",
            share[-1],
            share,
            change.get(chunk),
            own_change.get(chunk, 0.0),
        )
        for chunk, share in zip(order, shares)
    ]


def _chosen(look: "_Look", own_change: dict[int, float], most: int) -> tuple[Tensor, Tensor]:
    """Return which chunks to leave out, `most` of them where there are more, and the others."""
    chunks = torch.tensor(sorted(own_change.keys() | set(look.chunks.tolist())))
    if len(chunks) <= most:
        return chunks, chunks[:0]
    by_counts = sorted(own_change, key=lambda chunk: -abs(own_change[chunk]))[: most // 2]
    telling = look.telling()
    telling[by_counts] = torch.inf
    chunks = chunks[telling[chunks].argsort(descending=True, stable=True)]
    return chunks[:most], chunks[most:]


class _Look:
    """The last event of a state, passed through all blocks."""

    def __init__(
        self,
        recommender: Recommender,
        state: UserState,
        last_input: Tensor,
        request_time: int | None,
        user: Told | None,
    ):
        network = recommender.network
        self._network, self._config, self._input = network, network.config, last_input
        device = network.start.device
        self._exact = torch.float64 if network.dtype == torch.float64 else torch.float32
        self._position = torch.tensor([state.num_events - 1], device=device)
        self._num_events = state.num_events
        self._own_chunk = (state.num_events - 1) // network.config.chunk_size
        self._blocks: list[Block] = [block for block in network.blocks if isinstance(block, Block)]
        self._chunk_of = {kind: self._chunks(kind, state.num_events) for kind in set(network.config.layer_kinds)}
        self._seen = [self._rows(layer) for layer in state.memory.layers]
        self._question = torch.zeros_like(last_input)
        with network.arithmetic():
            if isinstance(network.request, torch.nn.Embedding):
                bucket = torch.tensor([request_bucket(state.last_timestamp, request_time)], device=device)
                self._question = self._question + network.request(bucket)
            told = network.told(recommender.told([state.last_timestamp], [request_time], [user]))
            self._question = self._question if told is None else self._question + told

    @property
    def chunks(self) -> Tensor:
        """The chunks that the last event sees in some block, its own among them, [C] ascending, on the CPU."""
        first = min((int(seen.chunk.min()) for seen in self._seen if len(seen.chunk)), default=self._own_chunk)
        return torch.arange(first, self._own_chunk + 1)

    def telling(self) -> Tensor:
        """Return by how much each chunk changes the residual stream of an event that sees all, by its size, on the CPU.

        Of all chunks of the history, [C]; summed over blocks.
        """
        telling = torch.zeros(self._own_chunk + 1, dtype=self._exact, device=self._input.device)
        with self._network.arithmetic():
            x, rotary = self._input, self._rotary(1)
            for seen, block in zip(self._seen, self._blocks):
                sight = self._attend(block, seen, x, rotary)
                weight = sight.weight[:, :, None]
                value = seen.value.to(self._exact).repeat_interleave(weight.shape[1] // seen.value.shape[1], 1)
                mass, part = (self._by_chunk(block.kind, rows) for rows in (weight, weight * value))
                change = (mass * sight.attended - part) / (1 - mass).clamp(min=1e-9)
                # The gate is one for all chunks: it goes into the matrix, which is small.
                gate = sigmoid_gate(torch.ones_like(sight.gate), sight.gate).flatten()
                branch = change.to(sight.gate).flatten(1) @ (gate[:, None] * block.output)
                first = self._own_chunk + 1 - len(branch)
                telling[first:] += branch.norm(dim=-1).to(telling) / sight.asked.norm().to(telling)
                x = block.finish(sight.asked, sight.attended.to(sight.gate), sight.gate)
        return telling.to("cpu")

    def without(self, left_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the user vector, then those without each of some chunks, [V, E (+ 1)], and where each block looked.

        The latter is its attention on each chunk of the history where none is left out, mean over heads, [L, C].
        """
        without = torch.cat((left_out.new_tensor([-1]), left_out)).to(self._input.device)
        attention = torch.zeros(len(self._blocks), self._own_chunk + 1, dtype=self._exact, device=without.device)
        with self._network.arithmetic():
            x, rotary = self._input.expand(len(without), -1), self._rotary(len(without))
            hidden = {kind: (chunk == without[:, None]).nonzero() for kind, chunk in self._chunk_of.items()}
            for seen, block, shares in zip(self._seen, self._blocks, attention):
                sight = self._attend(block, seen, x, rotary, hidden[block.kind])
                by_chunk = self._by_chunk(block.kind, sight.weight.mean(1))
                shares[self._own_chunk + 1 - len(by_chunk) :] = by_chunk
                shares[self._own_chunk] += sight.own_weight.mean()
                x = block.finish(sight.asked, sight.attended.to(sight.gate), sight.gate)
        return self._network.user_vectors(x).to("cpu", self._exact), attention.to("cpu")

    def _rotary(self, count: int) -> Rotary:
        """Return the last event's angles, of so many variants."""
        return rotary_table(self._position.expand(count), self._config.head_dim, self._exact)

    def _attend(self, block: Block, seen: "_Seen", x: Tensor, rotary: Rotary, hidden: Tensor | None = None) -> "_Sight":
        """Let variants of the last event, [V, E], attend to rows and themselves, but for (variant, row) [h, 2]."""
        asked = x + self._question if block is self._blocks[-1] else x
        query, gate, own = block.event(asked, rotary)
        if asked is not x:
            own = block.event.keys_values(x, rotary)
        scaled = query.to(self._exact) * query.shape[-1] ** -0.5
        grouped_KVGD = scaled.unflatten(1, (self._config.num_kv_heads, -1)).transpose(0, 1).contiguous()
        own_key, own_value = own.to(self._exact).transpose(0, 2)[:, :, :, None].unbind(1)
        scores = grouped_KVGD.new_empty(*grouped_KVGD.shape[:3], len(seen.key) + 1)
        keys, values = seen.key.to(self._exact).permute(1, 2, 0), seen.value.to(self._exact).transpose(0, 1)
        torch.bmm(grouped_KVGD.flatten(1, 2), keys, out=scores.flatten(1, 2)[..., :-1])
        scores[..., -1] = torch.linalg.vecdot(grouped_KVGD, own_key)
        if hidden is not None:
            variant, row = hidden.T
            scores[:, variant, :, row] = -torch.inf
        weight = scores.softmax(-1)
        attended = torch.bmm(weight.flatten(1, 2)[..., :-1], values).view_as(grouped_KVGD)
        attended = (attended + weight[..., -1:] * own_value).transpose(0, 1).flatten(1, 2)
        of_first = weight[:, 0].flatten(0, 1).T
        return _Sight(asked, gate, of_first[:-1], of_first[-1], attended.contiguous())

    def _by_chunk(self, kind: LayerKind, rows: Tensor) -> Tensor:
        """Return sums over each chunk's rows, [C, ...] of [n, ...], from the first chunk a block of a kind sees."""
        first = window_start(self._config, kind, self._num_events) // self._config.chunk_size
        num_recent = self._num_events - 1 - first * self._config.chunk_size
        chunk, old = self._chunk_of[kind][:num_recent], rows[num_recent:]
        recent = rows.new_zeros(self._own_chunk + 1 - first, *rows.shape[1:])
        recent.index_add_(0, chunk - first, rows[:num_recent])
        return torch.cat((old.unflatten(0, (-1, num_summaries(self._config))).sum(1), recent)) if len(old) else recent

    def _chunks(self, kind: LayerKind, num_events: int) -> Tensor:
        """Return the chunk of each row that the last event sees in a block of a kind but its own, [n]: events first."""
        config, start = self._config, window_start(self._config, kind, num_events)
        per_chunk = num_summaries(config) if kind == "summary" else 0
        first, window_chunk = first_visible_chunk(config, num_events), start // config.chunk_size
        num_old = max(0, window_chunk - first) * per_chunk
        summary_chunk = first + torch.arange(num_old) // max(1, per_chunk)
        event_chunk = torch.arange(start, num_events - 1) // config.chunk_size
        return torch.cat((event_chunk, summary_chunk)).to(self._position.device)

    def _rows(self, layer: LayerState) -> "_Seen":
        """Return what the last event sees in a block but itself, whose row is the last of the events."""
        chunk = self._chunk_of[layer.kind]
        parts = layer.events.whole()[:-1], *layer.summaries.parts()  # in the end are summaries of the window's chunks
        key, value = torch.cat(parts)[: len(chunk)].unbind(1)
        return _Seen(key, value, chunk)


@dataclass(frozen=True)
class _Seen:
    """What the last event sees in one block but itself: keys and values [n, H_kv, D], and the chunk of each [n]."""

    key: Tensor
    value: Tensor
    chunk: Tensor


@dataclass(frozen=True)
class _Sight:
    """How variants of the last event looked in one block.

    asked: what asked, [V, E]; gate: of the attention's output, [V, H, D]; weight: the first one's attention on rows,
    [n, H]; own_weight: on itself, [H]; attended: the attention's output, [V, H, D].
    """

    asked: Tensor
    gate: Tensor
    weight: Tensor
    own_weight: Tensor
    attended: Tensor


def _item_vector(recommender: Recommender, row: int) -> Tensor:
    network = recommender.network
    vector = network.item_vectors(torch.tensor([row], device=network.start.device))[0]
    return vector.to("cpu", torch.float64 if network.dtype == torch.float64 else torch.float32)
