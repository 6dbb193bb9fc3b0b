"""Append events to user states, and ask them. A batch of users equals its users one by one.

Appending runs the same pass as training on the new events alone, on top of the rows the state holds; so whatever way
a history is cut into arrivals, state and answers equal those of one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.errors import StateError
from recsys_ksa.model.network import Network, Rows
from recsys_ksa.model.place import chunk_layout, num_summaries, place_arrivals
from recsys_ksa.model.rotary import rotary_table
from recsys_ksa.model.state import LayerState, Memory, SharedRows, first_visible_chunk, window_start


@dataclass(frozen=True)
class Arrivals:
    """New events of several users, jagged: what the network reads of them.

    counts: events of each user, at least 1.
    item_index, gap_bucket: int64 [n]; event_type: int64 [n], or None where events have no type.
    """

    counts: list[int]
    item_index: Tensor
    event_type: Tensor | None
    gap_bucket: Tensor


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
    network: Network, memories: Sequence[Memory], arrivals: Arrivals, attention_impl: str = "auto"
) -> list[Memory]:
    """Return each user's memory after its new events; the old ones stay valid. `network` is in eval mode."""
    config = network.config
    had = [memory.num_events for memory in memories]
    kinds: list[LayerKind] = list(dict.fromkeys(config.layer_kinds))
    key_start: dict[LayerKind, list[int]] = {
        kind: [window_start(config, kind, count) for count in had] for kind in kinds
    }
    place = place_arrivals(config, had, arrivals.counts, key_start, network.start.device, network.dtype)
    with network.arithmetic():
        inputs = network.embed(
            arrivals.item_index,
            arrivals.event_type,
            arrivals.gap_bucket,
            torch.tensor(arrivals.counts, device=arrivals.item_index.device),
        )
        earlier = [
            Rows(
                _join([memory.layers[depth].events.whole() for memory in memories]),
                _join([_visible(config, memory, depth) for memory in memories]),
            )
            for depth in range(len(config.layer_kinds))
        ]
        encoded = network.encode(inputs, place, attention_impl, earlier)
    after: list[Memory] = []
    event_ends = torch.tensor(arrivals.counts).cumsum(0).tolist()
    bounds = {kind: place.layouts[kind].event_key_offsets.tolist() for kind in kinds}
    summary_bounds = place.layouts["summary"].summary_key_offsets.tolist() if "summary" in kinds else None
    for user, memory in enumerate(memories):
        total = had[user] + arrivals.counts[user]
        layers: list[LayerState] = []
        for depth, layer in enumerate(memory.layers):
            rows = encoded.rows[depth]
            events = rows.events[bounds[layer.kind][user] : bounds[layer.kind][user + 1]]
            if layer.kind == "full":
                layers.append(LayerState("full", layer.events.extend(events[had[user] :]), layer.summaries))
                continue
            keep = window_start(config, "summary", total) - key_start["summary"][user]
            window = SharedRows((), events[keep:].clone())
            summaries = layer.summaries
            if summary_bounds is not None and (per_chunk := num_summaries(config)):
                new = per_chunk * (total // config.chunk_size - had[user] // config.chunk_size)
                end = summary_bounds[user + 1]
                summaries = summaries.extend(rows.summaries[end - new : end])
                gone = first_visible_chunk(config, total) - first_visible_chunk(config, had[user])
                summaries = summaries.drop(per_chunk * gone)
            layers.append(LayerState("summary", window, summaries))
        after.append(Memory(total, tuple(layers), encoded.last_input[event_ends[user] - 1].clone()))
    return after


@torch.inference_mode()
def ask(
    network: Network, memories: Sequence[Memory], request_bucket: Sequence[int], attention_impl: str = "auto"
) -> Tensor:
    """Return user vectors, [U, E (+ 1)]. Nothing is appended. A user without events gets the learned start."""
    device = network.start.device
    vectors = network.user_vectors(network.start.expand(len(memories), -1))
    known = [user for user, memory in enumerate(memories) if memory.num_events]
    if not known:
        return vectors
    config = network.config
    kind = config.layer_kinds[-1]
    asked = [memories[user] for user in known]
    counts = [memory.num_events for memory in asked]
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    last = [count - 1 for count in counts]
    layout = chunk_layout(config, kind, offsets, last, [window_start(config, kind, count) for count in counts])
    rows = Rows(
        _join([memory.layers[-1].events.whole() for memory in asked]),
        _join([memory.layers[-1].summaries.whole() for memory in asked]),
    )
    table_dtype = torch.float64 if network.dtype == torch.float64 else torch.float32
    rotary = rotary_table(torch.tensor(last, device=device), config.head_dim, table_dtype)
    bucket = torch.tensor([request_bucket[user] for user in known], device=device)
    with network.arithmetic():
        hidden = network.answer(
            torch.stack([memory.last_input for memory in asked]),
            bucket,
            rows,
            layout.to(device),
            rotary,
            attention_impl=attention_impl,
        )
    answers = network.user_vectors(hidden)
    if len(known) == len(memories):
        return answers
    vectors = vectors.clone()
    vectors[torch.tensor(known, device=device)] = answers
    return vectors


def replay_start(config: ModelConfig, num_events: int) -> int:
    """Return the first event a replay from stored summaries needs: that of chunk max(0, c - L * W)."""
    last_chunk = max(0, num_events - 1) // config.chunk_size
    return max(0, last_chunk - len(config.layer_kinds) * config.window_chunks) * config.chunk_size


@torch.inference_mode()
def replay(network: Network, stored: Memory, arrivals: Arrivals, attention_impl: str = "auto") -> Memory:
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
    earlier: list[Rows] = []
    fixed: list[Rows] = []
    for layer in stored.layers:
        events, summaries = layer.events.whole(), layer.summaries.whole()
        if layer.kind == "full":
            earlier.append(Rows(events[:start], summaries))
        else:
            blank = events.new_zeros(start - window, *events.shape[1:])
            earlier.append(Rows(blank, summaries[:closed]))
        fixed.append(Rows(events, summaries))
    key_start: dict[LayerKind, list[int]] = {"summary": [window], "full": [0]}
    place = place_arrivals(config, [start], arrivals.counts, key_start, network.start.device, network.dtype)
    with network.arithmetic():
        inputs = network.embed(
            arrivals.item_index,
            arrivals.event_type,
            arrivals.gap_bucket,
            torch.tensor(arrivals.counts, device=arrivals.item_index.device),
        )
        encoded = network.encode(inputs, place, attention_impl, earlier, fixed)
    keep = window_start(config, "summary", total) - window
    layers = tuple(
        layer
        if layer.kind == "full"
        else LayerState("summary", SharedRows((), rows.events[keep:].clone()), layer.summaries)
        for layer, rows in zip(stored.layers, encoded.rows)
    )
    return Memory(total, layers, encoded.last_input[-1].clone())


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _visible(config: ModelConfig, memory: Memory, depth: int) -> Tensor:
    """Return the summary rows the next event's layout asks for; the state may hold one chunk more."""
    layer = memory.layers[depth]
    rows = layer.summaries.whole()
    if layer.kind == "full" or config.max_visible_chunks is None:
        return rows
    next_chunk = memory.num_events // config.chunk_size
    first = max(0, next_chunk - config.window_chunks - config.max_visible_chunks)
    return rows[num_summaries(config) * (first - first_visible_chunk(config, memory.num_events)) :]
