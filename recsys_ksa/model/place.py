"""Where the tokens of one pass sit: layouts, rotary tables, and how many are new.

Built once a pass and shared by all layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ksa_kernels import ChunkLayout
from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.model.rotary import Rotary, rotary_table, summary_position


@dataclass(frozen=True)
class Place:
    """Placement of a pass's T new events and S new summaries.

    layouts: for each kind of layer in use.
    event_rotary, summary_rotary: of the new events and the new summaries.
    summary_slot: int64 [S], the learned input each new summary starts from.
    new_events, new_summaries: how many of them each user has.
    """

    layouts: Mapping[LayerKind, ChunkLayout]
    event_rotary: Rotary
    summary_rotary: Rotary
    summary_slot: Tensor
    new_events: Sequence[int]
    new_summaries: Sequence[int]


def num_summaries(config: ModelConfig) -> int:
    """Return the summary tokens a closed chunk has; 0 where the window is all there is."""
    return config.summaries_per_chunk if config.attention == "summary" else 0


def chunk_layout(
    config: ModelConfig,
    kind: LayerKind,
    offsets: Tensor | Sequence[int],
    query_start: Sequence[int] | None = None,
    key_start: Sequence[int] | None = None,
    unseen_summaries: bool = True,
) -> ChunkLayout:
    """Return the layout of a layer of `kind` over whole histories of lengths `offsets.diff()`."""
    full = kind == "full"
    return ChunkLayout.from_offsets(
        offsets,
        chunk_size=config.chunk_size,
        summaries_per_chunk=0 if full else num_summaries(config),
        window_chunks=None if full else config.window_chunks,
        max_visible_chunks=None if full else config.max_visible_chunks,
        query_start=query_start,
        key_start=key_start,
        unseen_summaries=unseen_summaries,
    )


def place_histories(
    config: ModelConfig,
    offsets: Tensor,
    first_position: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    unseen_summaries: bool = True,
) -> Place:
    """Place histories that have no earlier rows (training, evaluation).

    Args:
        offsets: int64 [U + 1].
        first_position: int64 [U], true index of the first event given of each; a multiple of chunk_size.
        unseen_summaries: whether there are summaries that only later events will see, too (what a state keeps).
    """
    layouts: dict[LayerKind, ChunkLayout] = {
        kind: chunk_layout(config, kind, offsets, unseen_summaries=unseen_summaries).to(device)
        for kind in dict.fromkeys(config.layer_kinds)
    }
    return _place(config, layouts, first_position.to(device), dtype)


def place_arrivals(
    config: ModelConfig,
    num_events: Sequence[int],
    num_new: Sequence[int],
    key_start: Mapping[LayerKind, Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
) -> Place:
    """Place new events behind the rows that earlier ones left.

    Args:
        num_events: events each user had before.
        num_new: events that arrive, at least 1 each.
        key_start: for each kind of layer, the first event whose row the state still holds.
    """
    offsets = [0, *accumulate(had + new for had, new in zip(num_events, num_new, strict=True))]
    layouts: dict[LayerKind, ChunkLayout] = {
        kind: chunk_layout(config, kind, offsets, num_events, key_start[kind]).to(device)
        for kind in dict.fromkeys(config.layer_kinds)
    }
    return _place(config, layouts, None, dtype)


def _place(
    config: ModelConfig, layouts: Mapping[LayerKind, ChunkLayout], first_position: Tensor | None, dtype: torch.dtype
) -> Place:
    layout = next(iter(layouts.values()))
    position = layout.event_query_index
    if first_position is not None:
        position = position + torch.repeat_interleave(first_position, layout.event_query_offsets.diff())
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    event_rotary = rotary_table(position, config.head_dim, table_dtype)
    slot, summary_rotary = position[:0], event_rotary  # without summaries nothing reads it
    summary_layout = layouts.get("summary", layout)
    if summary_layout.num_query_summaries:
        slot = summary_layout.summary_query_slot
        position = summary_position(
            summary_layout.summary_query_chunk, slot, config.chunk_size, config.summaries_per_chunk
        )
        if first_position is not None:
            counts = summary_layout.summary_query_offsets.diff()
            position = position + torch.repeat_interleave(first_position, counts)
        summary_rotary = rotary_table(position, config.head_dim, table_dtype)
    return Place(
        layouts=layouts,
        event_rotary=event_rotary,
        summary_rotary=summary_rotary,
        summary_slot=slot,
        new_events=[span.num_query_events for span in layout.spans],
        new_summaries=[summary_layout.summaries_per_chunk * span.num_query_chunks for span in summary_layout.spans],
    )
