"""Append events to user states, and ask them. A batch of users equals its users one by one.

Appending runs the same pass as training on the new events alone, on top of the rows the state holds; so whatever way
a history is cut into arrivals, state and answers equal those of one pass. Few events on a CPU are passed through NumPy
(`few_events`), which is called faster and computes the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.errors import StateError
from recsys_ksa.model import few_events, paged_append
from recsys_ksa.model.array_block import ArrayNetwork
from recsys_ksa.model.network import EarlierRows, Network, Rows
from recsys_ksa.model.pages import PagePool
from recsys_ksa.model.place import Place, chunk_layout, num_summaries, place_arrivals
from recsys_ksa.model.rotary import rotary_table
from recsys_ksa.model.state import (
    LayerState,
    Memory,
    SharedRows,
    UserMemory,
    first_visible_chunk,
    grown,
    window_start,
)
from recsys_ksa.model.threads import fitting_threads

if TYPE_CHECKING:
    from recsys_ksa.data.batches import QuestionRows


@dataclass(frozen=True)
class Arrivals:
    """New events of several users, jagged: what the network reads of them.

    counts: events of each user, at least 1.
    item_index, gap_bucket: int64 [n]; event_type: int64 [n], or None where events have no type.
    features: int64 [n] each, by name: the other features that are on (`EventFeatures`).
    """

    counts: list[int]
    item_index: Tensor
    event_type: Tensor | None
    gap_bucket: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


def empty_memory(network: Network) -> Memory:
    """Return the memory of a user without events."""
    config = network.config
    device = network.start.device
    dtype = network.state_dtype
    nothing = SharedRows((), torch.zeros(0, 2, config.num_kv_heads, config.head_dim, dtype=dtype, device=device))
    layers = tuple(LayerState(kind, nothing, nothing) for kind in config.layer_kinds)
    return Memory(0, layers, torch.zeros(config.dim, dtype=network.dtype, device=device))


@torch.inference_mode()
def append_events(
    network: Network,
    memories: Sequence[UserMemory],
    arrivals: Arrivals,
    attention_impl: str = "auto",
    pool: PagePool | None = None,
) -> list[UserMemory]:
    """Return each user's memory after its new events; the old ones stay valid. `network` is in eval mode.

    Args:
        attention_impl: of `summary_attention`; `auto` picks by device and number of events, and may pick NumPy.
        pool: whose pages are to hold the memories; None: each has tensors of its own.

    Raises:
        PoolFullError: the pool has no room.
    """
    if pool is None:
        return [*_append(network, memories, arrivals, attention_impl)]
    if max(arrivals.counts) > paged_append.MOST_EVENTS:
        return [pool.hold(memory) for memory in _append(network, memories, arrivals, attention_impl)]
    with network.arithmetic():
        inputs = _inputs(network, arrivals)
        return [*paged_append.append_in_pages(network, pool, memories, arrivals.counts, inputs, attention_impl)]


def _append(network: Network, memories: Sequence[UserMemory], arrivals: Arrivals, attention_impl: str) -> list[Memory]:
    """Return `append_events` in tensors of each memory's own."""
    config = network.config
    if max(arrivals.counts) <= few_events.MOST_EVENTS and (arrays := _arrays(network, attention_impl)):
        ids = network.embedding.ids(arrivals.item_index, arrivals.event_type, arrivals.gap_bucket, arrivals.features)
        return few_events.append_few(config, arrays, memories, arrivals.counts, ids)
    had = [memory.num_events for memory in memories]
    layers = [memory.layers for memory in memories]
    key_start: dict[LayerKind, list[int]] = {
        kind: [window_start(config, kind, count) for count in had] for kind in dict.fromkeys(config.layer_kinds)
    }
    place = place_arrivals(config, had, arrivals.counts, key_start, network.start.device, network.dtype)
    unseen = [_unseen_summaries(config, count) for count in had]
    earlier = [
        EarlierRows(
            [own[depth].events.parts() for own in layers],
            [own[depth].summaries.parts(skip) for own, skip in zip(layers, unseen)],
        )
        for depth in range(len(config.layer_kinds))
    ]
    with network.arithmetic(), fitting_threads(sum(arrivals.counts)):
        inputs = _inputs(network, arrivals)
        encoded = network.encode(inputs, place, attention_impl, earlier)
    grown_layers = [
        _grown(config, [own[depth] for own in layers], rows, place) for depth, rows in enumerate(encoded.rows)
    ]
    last_inputs = [inputs[-1].clone() for inputs in _by_user(encoded.last_input, arrivals.counts)]
    return [
        Memory(count + new, own_layers, last_input)
        for count, new, own_layers, last_input in zip(had, arrivals.counts, zip(*grown_layers), last_inputs)
    ]


def _grown(config: ModelConfig, layers: Sequence[LayerState], rows: Rows, place: Place) -> list[LayerState]:
    """Return one layer's states of all users after a pass that left `rows`."""
    layout = place.layouts[layers[0].kind]
    events_of = _by_user(rows.events, [span.num_key_events for span in layout.spans])
    m = layout.summaries_per_chunk
    summaries_of = _by_user(rows.summaries, [m * span.num_key_chunks for span in layout.spans])
    return [
        grown(config, layer, span.query_start, span.num_events, events, summaries[-new:] if new else None)
        for layer, events, summaries, span, new in zip(
            layers, events_of, summaries_of, layout.spans, place.new_summaries
        )
    ]


@torch.inference_mode()
def ask(
    network: Network,
    memories: Sequence[UserMemory],
    request_bucket: Sequence[int],
    attention_impl: str = "auto",
    told: "QuestionRows | None" = None,
    pool: PagePool | None = None,
) -> Tensor:
    """Return user vectors, [U, E (+ 1)]. Nothing is appended. A user without events gets the learned start.

    Args:
        told: what is told beside the history, of each user; None for a network that is told nothing.
        pool: whose pages hold the memories; one that is elsewhere is brought there to be asked.
    """
    device = network.start.device
    known = [user for user, memory in enumerate(memories) if memory.num_events]
    extra = network.told(told)
    everyone = network.starts(len(memories), extra)
    if not known:
        return network.user_vectors(everyone)
    if extra is not None and len(known) < len(memories):
        extra = extra[torch.tensor(known, device=device)]
    asked, buckets = [memories[user] for user in known], [request_bucket[user] for user in known]
    with network.arithmetic(), fitting_threads(len(asked)):
        if pool is not None:
            hidden = paged_append.answer_in_pages(network, pool, asked, buckets, attention_impl, extra)
        elif arrays := _arrays(network, attention_impl):
            hidden = few_events.answer_few(network.config, arrays, asked, buckets, extra)
        else:
            hidden = _answer(network, asked, buckets, attention_impl, extra)
    if len(known) < len(memories):
        everyone = everyone.clone()
        everyone[torch.tensor(known, device=device)] = hidden.to(everyone.dtype)
        hidden = everyone
    return network.user_vectors(hidden)


def _answer(
    network: Network,
    memories: Sequence[UserMemory],
    request_bucket: Sequence[int],
    attention_impl: str,
    told: Tensor | None,
) -> Tensor:
    """Return the last block's output for each user's last event, [U, E]; every user has events."""
    config, kind, device = network.config, network.last_kind, network.start.device
    counts = [memory.num_events for memory in memories]
    last = [count - 1 for count in counts]
    key_start = [window_start(config, kind, count) for count in counts]
    layout = chunk_layout(config, kind, [0, *accumulate(counts)], last, key_start).to(device)
    layers = [memory.layers[-1] for memory in memories]
    rows = Rows(
        _joined([layer.events.parts() for layer in layers]), _joined([layer.summaries.parts() for layer in layers])
    )
    table_dtype = torch.float64 if network.dtype == torch.float64 else torch.float32
    return network.answer(
        torch.stack([memory.last_input for memory in memories]),
        torch.tensor(request_bucket, device=device),
        rows,
        layout,
        rotary_table(torch.tensor(last, device=device), config.head_dim, table_dtype),
        attention_impl=attention_impl,
        told=told,
    )


def replay_start(config: ModelConfig, num_events: int) -> int:
    """Return the first event a replay from stored summaries needs: that of chunk max(0, c - L * W)."""
    last_chunk = max(0, num_events - 1) // config.chunk_size
    return max(0, last_chunk - len(config.layer_kinds) * config.window_chunks) * config.chunk_size


@torch.inference_mode()
def replay(network: Network, stored: UserMemory, arrivals: Arrivals, attention_impl: str = "auto") -> Memory:
    """Rebuild a user's memory exactly from its stored summaries (and full layers' rows) and its newest events.

    Args:
        stored: a memory whose summary layers may lack their events; summaries and full layers are used as they are.
        arrivals: the events from `replay_start(config, stored.num_events)` on, with their true gaps.

    Raises:
        StateError: summaries are not all kept (`max_visible_chunks`), or the events are not those needed.
    """
    config = network.config
    total = stored.num_events
    start = replay_start(config, total)
    if arrivals.counts != [total - start]:
        raise StateError(
            f"replay: expected the {total - start} events from index {start} on, got {arrivals.counts}. "
            "Read them from the log."
        )
    if first_visible_chunk(config, total):
        raise StateError(
            "replay: expected every summary to be kept, got a state cut by max_visible_chunks. Rebuild it from the log."
        )
    closed = start // config.chunk_size * num_summaries(config)
    window = window_start(config, "summary", start + 1)  # rows that the first queries would see: warm-up, never kept
    earlier: list[EarlierRows] = []
    fixed: list[Rows] = []
    for layer in stored.layers:
        events, summaries = layer.events.whole(), layer.summaries.whole()
        if layer.kind == "full":
            earlier.append(EarlierRows([[events[:start]]], [[summaries]]))
        else:
            blank = events.new_zeros(start - window, *events.shape[1:])
            earlier.append(EarlierRows([[blank]], [[summaries[:closed]]]))
        fixed.append(Rows(events, summaries))
    key_start: dict[LayerKind, list[int]] = {"summary": [window], "full": [0]}
    place = place_arrivals(config, [start], arrivals.counts, key_start, network.start.device, network.dtype)
    with network.arithmetic():
        inputs = _inputs(network, arrivals)
        encoded = network.encode(inputs, place, attention_impl, earlier, fixed)
    keep = window_start(config, "summary", total) - window
    layers = tuple(
        layer
        if layer.kind == "full"
        else LayerState("summary", SharedRows((), rows.events[keep:].clone()), layer.summaries)
        for layer, rows in zip(stored.layers, encoded.rows)
    )
    return Memory(total, layers, encoded.last_input[-1].clone())


def _arrays(network: Network, attention_impl: str) -> ArrayNetwork | None:
    """Return the network for passes over few events in NumPy, where it can; what is asked for by name is used."""
    return network.arrays if attention_impl == "auto" and network.precision == "float32" else None


def _inputs(network: Network, arrivals: Arrivals) -> Tensor:
    """Return the new events' inputs, [n, E]."""
    return network.embed(
        arrivals.item_index, arrivals.event_type, arrivals.gap_bucket, arrivals.counts, arrivals.features
    )


def _by_user(rows: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    return [rows] if len(counts) == 1 else rows.split(list(counts))


def _joined(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return all users' rows in one tensor."""
    flat = [part for own in parts for part in own]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _unseen_summaries(config: ModelConfig, num_events: int) -> int:
    """Return how many of the state's oldest summaries the next event does not see: at most one chunk's."""
    if config.max_visible_chunks is None:
        return 0
    next_chunk = num_events // config.chunk_size
    first = max(0, next_chunk - config.window_chunks - config.max_visible_chunks)
    return num_summaries(config) * (first - first_visible_chunk(config, num_events))
