"""Which chunks of a history carried a score. Importing this imports torch.

The last block's query looks at the summaries of older chunks and at the window's events. Its attention, averaged over
heads, tells where it looked. Leaving one chunk out is exact in that block: with p the attention and v the values, the
output without chunk c is (sum p v - sum over c of p v) / (1 - sum over c of p), for all chunks at once. What a chunk
gave to younger chunks' rows in earlier blocks stays, so the change is what the last block took from it directly.
"""

import torch
from torch import Tensor

from ksa_serving.errors import InvalidRequestError
from ksa_serving.models import ChunkReason
from recsys_ksa.features import Told, request_bucket
from recsys_ksa.model.block import Block
from recsys_ksa.model.place import num_summaries
from recsys_ksa.model.rotary import rotary_table
from recsys_ksa.model.state import UserState, first_visible_chunk, window_start
from recsys_ksa.recommender import Recommender


@torch.inference_mode()
def explain(
    recommender: Recommender,
    state: UserState,
    item_id: str,
    request_time: int | None,
    most: int,
    user: Told | None = None,
) -> list[ChunkReason]:
    """Return the chunks the last block attended to, most attended first, `most` of them with their score change.

    Raises:
        InvalidRequestError: the model does not know the item.
        DataError: it does not read what is told of the user.
    """
    item = _item_vector(recommender, item_id)
    if not state.num_events:
        return []
    config, num_events = recommender.network.config, state.num_events
    look = _Look(recommender, state, request_time, user)
    order = look.mass.mean(1).argsort(descending=True, stable=True)
    left_out = order[:most]
    rest = (1 - look.mass[left_out])[:, :, None]
    # A history of one chunk has nothing left to look at without it.
    without = torch.where(rest > 1e-9, (look.whole - look.part[left_out]) / rest.clamp(min=1e-9), 0.0)
    score, *others = (look.user_vectors(torch.cat((look.whole[None], without))) @ item).tolist()
    change = {int(at): score - other for at, other in zip(left_out, others)}
    reasons: list[ChunkReason] = []
    for at in order.tolist():
        first = int(look.chunks[at]) * config.chunk_size
        reasons.append(
            ChunkReason(
                first=first,
                last=min(first + config.chunk_size, num_events) - 1,
                seen_as="summary" if int(look.chunks[at]) in look.old else "events",
                attention=float(look.mass[at].mean()),
                score_change=change.get(at),
            )
        )
    return reasons


@torch.inference_mode()
def base_score(
    recommender: Recommender, state: UserState, item_id: str, request_time: int | None, user: Told | None = None
) -> float:
    """Return an item's score without the own-item bias, by this file's arithmetic."""
    look = _Look(recommender, state, request_time, user)
    return float(look.user_vectors(look.whole[None])[0] @ _item_vector(recommender, item_id))


class _Look:
    """Where the last block looked. C chunks, H heads, D head dim.

    chunks [C]; old: those seen through summaries; mass [C, H]: attention; part [C, H, D]: attention times values;
    whole [H, D]: their sum, the block's attention output.
    """

    def __init__(self, recommender: Recommender, state: UserState, request_time: int | None, user: Told | None):
        network = recommender.network
        block = network.blocks[-1]
        assert isinstance(block, Block)
        self._network, self._block = network, block
        device = network.start.device
        bucket = torch.tensor([request_bucket(state.last_timestamp, request_time)], device=device)
        exact = torch.float64 if network.dtype == torch.float64 else torch.float32
        position = torch.tensor([state.num_events - 1], device=device)
        with network.arithmetic():
            self._asked = state.memory.last_input[None]
            if isinstance(network.request, torch.nn.Embedding):
                self._asked = self._asked + network.request(bucket)
            told = network.told(recommender.told([state.last_timestamp], [request_time], [user]))
            self._asked = self._asked if told is None else self._asked + told
            rotary = rotary_table(position, network.config.head_dim, exact)
            query, self._gate = block.event.queries(self._asked, rotary)
        rows, chunk, num_old = _visible_rows(recommender, state)
        weight, value = _attention(query[0], rows)
        self.chunks, place = torch.unique(chunk, return_inverse=True)
        self.old = set(chunk[:num_old].tolist())
        self.mass = torch.zeros(len(self.chunks), weight.shape[0], dtype=weight.dtype).index_add_(0, place, weight.T)
        self.part = torch.zeros(len(self.chunks), *value.shape[1:], dtype=weight.dtype)
        self.part.index_add_(0, place, weight.T[:, :, None] * value)
        self.whole = self.part.sum(0)

    def user_vectors(self, attended: Tensor) -> Tensor:
        """Return the user vector after each attention output, [n, H, D] -> [n, E (+ 1)], on the CPU."""
        n = len(attended)
        with self._network.arithmetic():
            attended = attended.to(self._gate)
            hidden = self._block.finish(self._asked.expand(n, -1), attended, self._gate.expand(n, -1, -1))
        return self._network.user_vectors(hidden).to("cpu", self.whole.dtype)


def _item_vector(recommender: Recommender, item_id: str) -> Tensor:
    row = recommender.run.items.index_of.get(item_id)
    if row is None:
        raise InvalidRequestError("item_id: expected an item the model knows, got another.", "unknown-item")
    network = recommender.network
    vector = network.item_vectors(torch.tensor([row], device=network.start.device))[0]
    return vector.to("cpu", torch.float64 if network.dtype == torch.float64 else torch.float32)


def _visible_rows(recommender: Recommender, state: UserState) -> tuple[Tensor, Tensor, int]:
    """Return the last block's visible rows [n, 2, H_kv, D], their chunks [n], and how many of them are summaries."""
    config, num_events = recommender.network.config, state.num_events
    layer = state.memory.layers[-1]
    start = window_start(config, layer.kind, num_events)
    events = layer.events.whole()
    event_chunk = torch.arange(start, num_events) // config.chunk_size
    per_chunk = num_summaries(config) if layer.kind == "summary" else 0
    first, window_chunk = first_visible_chunk(config, num_events), start // config.chunk_size
    num_old = max(0, window_chunk - first) * per_chunk
    summary_chunk = first + torch.arange(num_old) // max(1, per_chunk)
    rows = torch.cat((layer.summaries.whole()[:num_old], events)).to("cpu")
    return rows, torch.cat((summary_chunk, event_chunk)), num_old


def _attention(query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention [H, n] and values [n, H, D] of one query [H, D] over rows [n, 2, H_kv, D]."""
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    repeat = query.shape[0] // rows.shape[2]
    key, value = rows.to(exact).repeat_interleave(repeat, dim=2).unbind(1)
    scores = torch.einsum("hd,nhd->hn", query.to("cpu", exact), key) * query.shape[-1] ** -0.5
    return scores.softmax(-1), value
