"""`attribution`'s reference: a history passed whole through the network with a chunk masked, plain, dense, slow."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ksa_kernels.summary_attention.reference import Tokens, visible
from ksa_serving.events import StoredEvent
from recsys_ksa.features import Told, request_bucket
from recsys_ksa.features.sessions import NO_PLACE
from recsys_ksa.model.block import Block
from recsys_ksa.model.place import num_summaries, place_histories
from recsys_ksa.recommender import Recommender

UnseenBy = Literal["last event", "everyone"]
"""Who does not see a chunk's events and summaries: the history's last event alone, or every later event and summary."""


class MaskedHistory:
    """A history of n events, at least one, with its C closed chunks' summaries behind them."""

    def __init__(
        self,
        recommender: Recommender,
        events: Sequence[StoredEvent],
        request_time: int | None,
        user: Told | None = None,
    ):
        network = self._network = recommender.network
        config, n = network.config, len(events)
        arrivals, _ = recommender.arrivals(events, *recommender.rows(events), [n], [None], [NO_PLACE])
        self._place = place_histories(
            config, torch.tensor([0, n]), torch.tensor([0]), network.start.device, network.dtype
        )
        last = events[-1].timestamp
        with torch.inference_mode():
            self._events = network.embed(
                arrivals.item_index, arrivals.event_type, arrivals.gap_bucket, arrivals.counts, arrivals.features
            )
            self._summaries = network.summary_input[self._place.summary_slot]
            self._question = torch.zeros_like(self._events[-1:])
            if isinstance(network.request, torch.nn.Embedding):
                self._question = self._question + network.request(torch.tensor([request_bucket(last, request_time)]))
            told = network.told(recommender.told([last], [request_time], [user]))
            self._question = self._question if told is None else self._question + told
        event, m = torch.arange(n), num_summaries(config)
        closed = torch.arange(n // config.chunk_size)
        is_summary = torch.arange(n + m * len(closed)) >= n
        self._chunk = torch.cat([event // config.chunk_size, closed.repeat_interleave(m)])
        tokens = Tokens(is_summary, self._chunk, torch.cat([event, torch.arange(m).repeat(len(closed))]))
        self._sight = {
            "summary": visible(tokens, tokens, config.window_chunks, config.max_visible_chunks),
            "full": ~is_summary & (torch.arange(len(is_summary)) <= torch.arange(len(is_summary))[:, None]),
        }
        self.num_chunks = (n - 1) // config.chunk_size + 1

    @torch.inference_mode()
    def user_vector(self, left_out: int | None = None, unseen_by: UnseenBy = "everyone") -> Tensor:
        """Return the user vector, [E (+ 1)]; the last event always sees itself."""
        network, n = self._network, len(self._events)
        events, summaries = self._events, self._summaries
        blocks = [block for block in network.blocks if isinstance(block, Block)]
        for block in blocks:
            is_last = block is blocks[-1]
            asked = torch.cat((events[:-1], events[-1:] + self._question)) if is_last else events
            query, gate = block.event.queries(asked, self._place.event_rotary)
            rows = block.event.keys_values(events, self._place.event_rotary)
            asking = block.summary if len(summaries) else None  # a `full` block passes summaries by
            summary_gate = gate[:0]
            if asking is not None:
                summary_query, summary_gate = asking.queries(summaries, self._place.summary_rotary)
                query = torch.cat((query, summary_query))
                rows = torch.cat((rows, asking.keys_values(summaries, self._place.summary_rotary)))
            sight = self._sight[block.kind] & self._mask(left_out, unseen_by)
            seen = _attend(query, rows, sight[: len(rows), : len(rows)])
            events = block.finish(asked, seen[:n], gate)
            if asking is not None:
                summaries = block.finish(summaries, seen[n:], summary_gate)
        return network.user_vectors(events[-1:])[0]

    def _mask(self, left_out: int | None, unseen_by: UnseenBy) -> Tensor:
        """Return which queries may see which keys, bool [n + m C, n + m C]."""
        last = len(self._events) - 1
        mask = torch.ones(len(self._chunk), len(self._chunk), dtype=torch.bool)
        if left_out is None:
            return mask
        gone = self._chunk == left_out
        if unseen_by == "everyone":
            mask[:, gone] = gone[:, None]  # itself it still sees
        mask[last, gone] = False
        mask[last, last] = True
        return mask


def _attend(query: Tensor, rows: Tensor, sight: Tensor) -> Tensor:
    """Return what queries [Tq, H, D] see in rows [Tk, 2, H_kv, D], of the queries' shape."""
    key, value = rows.repeat_interleave(query.shape[1] // rows.shape[2], dim=2).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sight, -torch.inf).softmax(-1), value)
