"""Append few events, or ask, in NumPy: what `Network.encode` and `Network.answer` do for many rows in torch.

The everyday pass is one event of one user: hundreds of operators on a few hundred numbers each. The weights are the
network's own, the formulas those of `array_block`, and who sees whom is told query by query (`sight`).
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.model.array_block import Array, ArrayNetwork, ArrayProjection, ArrayRotary, attend, rotary_of
from recsys_ksa.model.place import num_summaries
from recsys_ksa.model.rotary import summary_position
from recsys_ksa.model.sight import HeldRows, Sight, event_sight, summary_sight
from recsys_ksa.model.state import LayerState, Memory, UserMemory, grown

MOST_EVENTS = 8
"""New events of a user up to which this way is the faster one."""


def append_few(
    config: ModelConfig,
    network: ArrayNetwork,
    memories: Sequence[UserMemory],
    counts: Sequence[int],
    ids: Mapping[str, Tensor],
) -> list[Memory]:
    """Return each user's memory after its new events.

    Args:
        counts: new events of each user, at least 1.
        ids: what the inputs of all users' new events are looked up by (`EventEmbedding.ids`).
    """
    ends = [(memory.num_events, memory.num_events + new) for memory, new in zip(memories, counts, strict=True)]
    events = _events(config, ends, network.embed({name: rows.numpy() for name, rows in ids.items()}))
    summaries = _summaries(config, ends, network.summary_input)
    layers: list[list[LayerState]] = [[] for _ in memories]
    last = len(network.blocks) - 1
    for depth, (block, kind) in enumerate(zip(network.blocks, config.layer_kinds)):
        tokens = [(events, block.event)]
        if summaries is not None and block.summary is not None:
            tokens.append((summaries, block.summary))
        for each, projection in tokens:
            each.project(projection)
        for user, (memory, (had, total)) in enumerate(zip(memories, ends)):
            layer = memory.layers[depth]
            new_events, *new_summaries = [each.rows[each.of_user[user]] for each, _ in tokens]
            held = HeldRows.of(config, layer, had, new_events, *new_summaries)
            kept = map(torch.from_numpy, (held.events, *new_summaries))
            layers[user].append(grown(config, layer, had, total, *kept))
            if depth < last:  # the last block's queries are `answer_few`'s
                for each, _ in tokens:
                    each.gather(user, kind, held)
        if depth < last:
            for each, _ in tokens:
                each.x = block.finish(each.x, each.seen, each.gate)
    return [
        Memory(total, tuple(own), torch.from_numpy(events.x[where.stop - 1].copy()))
        for (_, total), own, where in zip(ends, layers, events.of_user)
    ]


def answer_few(
    config: ModelConfig,
    network: ArrayNetwork,
    memories: Sequence[UserMemory],
    request_bucket: Sequence[int],
    told: Tensor | None = None,
) -> Tensor:
    """Return the last block's output for each user's last event, [U, E]; every user has events.

    Args:
        told: what each question tells beside the history, [U, E].
    """
    block, kind = network.blocks[-1], config.layer_kinds[-1]
    last = [memory.num_events - 1 for memory in memories]
    asked = np.stack([memory.last_input.numpy() for memory in memories])
    if network.request is not None:
        asked = asked + network.request[request_bucket]
    if told is not None:
        asked = asked + told.numpy()
    query, gate = block.event.queries(asked, rotary_of(last, config.head_dim, asked.dtype))
    seen = np.empty_like(query)
    for user, memory in enumerate(memories):
        held = HeldRows.of(config, memory.layers[-1], memory.num_events)
        seen[user] = attend(query[user], held.seen(event_sight(config, kind, last[user])))
    return torch.from_numpy(block.finish(asked, seen, gate))


class _Tokens:
    """The new tokens of one kind of all users: their residual stream, and what a block makes of it."""

    query: Array
    gate: Array
    rows: Array
    seen: Array

    def __init__(self, x: Array, rotary: ArrayRotary, sights: Mapping[LayerKind, list[list[Sight]]]) -> None:
        """Take inputs [T, E] and, for each kind of layer, what each token of each user sees there."""
        self.x, self.rotary, self.sights = x, rotary, sights
        counts = [len(own) for own in next(iter(sights.values()))]
        self.of_user = [slice(first, stop) for first, stop in pairwise(accumulate(counts, initial=0))]

    def project(self, projection: ArrayProjection) -> None:
        """Let a block's projection make queries, gates, keys and values."""
        self.query, self.gate, self.rows = projection(self.x, self.rotary)
        self.seen = np.empty_like(self.query)

    def gather(self, user: int, kind: LayerKind, held: HeldRows) -> None:
        """Let a user's tokens attend to what is held for them."""
        for at, sight in enumerate(self.sights[kind][user], start=self.of_user[user].start):
            self.seen[at] = attend(self.query[at], held.seen(sight))


def _events(config: ModelConfig, ends: Sequence[tuple[int, int]], x: Array) -> _Tokens:
    """Return the events from the first up to the second number of `ends`, with their inputs [T, E]."""
    sights: dict[LayerKind, list[list[Sight]]] = {
        kind: [[event_sight(config, kind, event) for event in range(had, total)] for had, total in ends]
        for kind in dict.fromkeys(config.layer_kinds)
    }
    position = [event for had, total in ends for event in range(had, total)]
    return _Tokens(x, rotary_of(position, config.head_dim, x.dtype), sights)


def _summaries(config: ModelConfig, ends: Sequence[tuple[int, int]], summary_input: Array) -> _Tokens | None:
    """Return the summaries of the chunks that close, learned inputs [m, E]; None where none closes."""
    k, m = config.chunk_size, num_summaries(config)
    closed = [[(chunk, slot) for chunk in range(had // k, total // k) for slot in range(m)] for had, total in ends]
    if not any(closed):
        return None
    chunk, slot = np.array([pair for own in closed for pair in own], dtype=np.int64).T
    rotary = rotary_of(summary_position(chunk, slot, k, m), config.head_dim, summary_input.dtype)
    sights = [[summary_sight(config, *pair) for pair in own] for own in closed]
    return _Tokens(summary_input[slot], rotary, {"summary": sights})
