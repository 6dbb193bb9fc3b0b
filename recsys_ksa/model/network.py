"""The whole network, in the order data flows: events -> tokens -> blocks -> user vectors -> scores.

Training, evaluation and user states share one path. A pass takes new event tokens and, optionally, the rows (keys
and values) that earlier events left behind; training is a pass without earlier rows. The request time enters only
the query and the residual of the last block, so no row ever depends on it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.errors import ConfigError
from recsys_ksa.features import NUM_GAP_BUCKETS
from recsys_ksa.model.block import Block, attend
from recsys_ksa.model.embeddings import EventEmbedding
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.own_items import DAY, OwnItemBias
from recsys_ksa.model.place import Place, place_histories
from recsys_ksa.model.popularity import Centre, PopularityBias
from recsys_ksa.model.rotary import Rotary
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from ksa_kernels import ChunkLayout
    from recsys_ksa.data.batches import Batch

# Shapes: U users, T events, S summaries, Q questions, I items, E model dim, D head dim.

MAX_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Rows:
    """Keys and values of one layer: events [T, 2, H_kv, D] and summaries [S, 2, H_kv, D], jagged by user."""

    events: Tensor
    summaries: Tensor


@dataclass(frozen=True)
class Encoded:
    """What a pass leaves: the last block's input of each new event [T, E], and every layer's merged rows."""

    last_input: Tensor
    rows: list[Rows]


class Network(nn.Module):
    """The recommender network (design: one residual stream of event tokens, one of summary tokens)."""

    def __init__(
        self, config: ModelConfig, features: FeatureSchema, precision: Literal["float32", "bf16"] = "float32"
    ) -> None:
        """Create the network with random parameters; `precision` is that of user states' matrix products."""
        super().__init__()
        _check(config, features)
        self.config = config
        self.precision = precision
        self.features = features
        self.embedding = EventEmbedding(config, features)
        self.summary_input = nn.Parameter(torch.randn(config.summaries_per_chunk, config.dim))
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.layer_kinds)
        self.request = nn.Embedding(NUM_GAP_BUCKETS, config.dim) if config.use_request_time else None
        self.start = nn.Parameter(torch.randn(config.dim))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.dim, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())
        self.item_bias = nn.Parameter(torch.zeros(features.num_items)) if config.item_bias == "learned" else None
        self.popularity_bias = PopularityBias() if config.item_bias == "popularity-7d" else None
        self.centre = Centre(config.dim) if config.item_bias == "popularity-7d" else None
        self.own_items = OwnItemBias(1.0 if features.clock == "ordinal" else DAY) if config.own_item_bias else None
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    def forward(self, batch: "Batch", attention_impl: str = "auto") -> Tensor:
        """Return one user vector a question, [Q, E] ([Q, E + 1] with an item bias); score = user . item."""
        place = place_histories(self.config, batch.offsets, batch.first_position, self.start.device, self.dtype)
        events = self.embed(batch.item_index, batch.event_type, batch.gap_bucket, batch.offsets.diff())
        encoded = self.encode(events, place, attention_impl)
        known = batch.question_row >= 0
        row = batch.question_row.clamp(min=0)
        bucket = torch.zeros(len(events), dtype=torch.int64, device=events.device)
        bucket[row[known]] = batch.request_bucket[known]
        layout = place.layouts[self.last_kind]
        if len(events):
            hidden = self.answer(
                encoded.last_input, bucket, encoded.rows[-1], layout, place.event_rotary, row, attention_impl
            )
            hidden = torch.where(known[:, None], hidden, self.start)
        else:
            hidden = self.start.expand(len(row), -1)
        return self.user_vectors(hidden)

    # --- events -> tokens -> blocks ---

    def embed(self, item_index: Tensor, event_type: Tensor | None, gap_bucket: Tensor, lengths: Tensor) -> Tensor:
        """Return event inputs [T, E]; see `EventEmbedding.forward`. In training some items are hidden."""
        if self.training and self.config.item_dropout:
            hidden = torch.rand(item_index.shape, device=item_index.device) < self.config.item_dropout
            item_index = item_index.masked_fill(hidden, UNKNOWN_ITEM)
        return self.dropout(self.embedding(item_index, event_type, gap_bucket, lengths).to(self.dtype))

    def encode(
        self,
        events: Tensor,
        place: Place,
        attention_impl: str = "auto",
        earlier: Sequence[Rows] | None = None,
        fixed: Sequence[Rows | None] | None = None,
    ) -> Encoded:
        """Run all blocks but the last one's queries.

        Args:
            events: inputs of the new events, [T, E].
            place: where they sit.
            earlier: each layer's rows of earlier events and summaries; none in training.
            fixed: each layer's rows known beforehand, in the layout's order, used in place of those computed here:
                summaries of a `summary` layer, events of a `full` one (replay of a stored state).
        """
        summaries = self.summary_input[place.summary_slot]
        rows: list[Rows] = []
        for depth, module in enumerate(self.blocks):
            block = self._block(module)
            summary = block.summary if len(summaries) else None  # most arrivals close no chunk
            normed = block.event.norm(events)
            summary_normed = summaries if summary is None else summary.norm(summaries)
            event_rows = block.event.keys_values(normed, place.event_rotary)
            new = Rows(
                event_rows,
                event_rows[:0] if summary is None else summary.keys_values(summary_normed, place.summary_rotary),
            )
            merged = _merge(new, earlier[depth] if earlier else None, place, block.kind)
            if fixed is not None and (known := fixed[depth]) is not None:
                merged = Rows(merged.events, known.summaries) if block.kind == "summary" else known
            rows.append(merged)
            if depth == len(self.blocks) - 1:
                break
            query, gate = block.event.queries(normed, place.event_rotary)
            if summary is not None:
                summary_query, summary_gate = summary.queries(summary_normed, place.summary_rotary)
            else:
                summary_query, summary_gate = query[:0], gate[:0]
            layout = place.layouts[block.kind]
            seen, summary_seen = attend(query, merged.events, summary_query, merged.summaries, layout, attention_impl)
            events = block.finish(events, seen, gate)
            if summary is not None:
                summaries = block.finish(summaries, summary_seen, summary_gate)
        return Encoded(events, rows)

    def answer(
        self,
        last_input: Tensor,
        request_bucket: Tensor,
        rows: Rows,
        layout: "ChunkLayout",
        rotary: Rotary,
        select: Tensor | None = None,
        attention_impl: str = "auto",
    ) -> Tensor:
        """Run the last block where something is asked. Returns [Q, E] for the selected rows (all if None).

        Args:
            last_input: the last block's input of the layout's query events, [T, E].
            request_bucket: int64 [T].
            rows: the last layer's keys and values.
            layout, rotary: of the query events.
            select: int64 [Q] into the query events.
        """
        block = self._block(self.blocks[-1])
        asked = last_input if self.request is None else last_input + self.request(request_bucket)
        query, gate = block.event.queries(block.event.norm(asked), rotary)
        unused = query.new_zeros(layout.num_query_summaries, *query.shape[1:])
        seen, _ = attend(query, rows.events, unused, rows.summaries, layout, attention_impl)
        if select is not None:
            asked, seen, gate = asked[select], seen[select], gate[select]
        return block.finish(asked, seen, gate)

    # --- user vectors -> scores ---

    def user_vectors(self, hidden: Tensor) -> Tensor:
        """Return unit vectors over temperature, and a trailing 1 with an item bias. [Q, E] -> [Q, E (+ 1)].

        With a popularity bias their mean is taken off first (`Centre`).
        """
        with torch.autocast(hidden.device.type, enabled=False):
            vectors = F.normalize(self.head(self.norm(hidden.to(self.dtype))), dim=-1)
            vectors = (vectors if self.centre is None else self.centre(vectors)) / self.temperature
        if self.config.item_bias == "none":
            return vectors
        return torch.cat((vectors, vectors.new_ones(len(vectors), 1)), dim=-1)

    def item_vectors(self, item_index: Tensor | None = None) -> Tensor:
        """Return unit item vectors, and the item's bias with one. int64 [C] -> [C, E (+ 1)]; None: every row.

        What `popularity_bias` gives depends on the day: it is 0 here, and whoever scores adds it.
        """
        rows = self.embedding.all_candidates() if item_index is None else self.embedding.candidates(item_index)
        vectors = F.normalize(rows, dim=-1)
        if self.config.item_bias == "none":
            return vectors
        if self.item_bias is None:
            return F.pad(vectors, (0, 1))
        bias = self.item_bias if item_index is None else self.item_bias[item_index]
        return torch.cat((vectors, bias[:, None]), dim=-1)

    def own_bias(self, item_index: Tensor, count: Tensor, first: Tensor, last: Tensor, now: Tensor) -> Tensor:
        """Return what an owned item's score gains, one each (user, item) pair; all tensors of one shape.

        A user's own count says more of an item than its popularity does, so the own-item bias takes the place of the
        item bias; what `popularity_bias` gives is not added to these items. See `OwnItemBias.forward`; 0 without an
        own-item bias.
        """
        if self.own_items is None:
            return torch.zeros(item_index.shape, dtype=self.dtype, device=item_index.device)
        bias = self.own_items(count, first, last, now)
        return bias if self.item_bias is None else bias - self.item_bias[item_index]

    @property
    def temperature(self) -> Tensor:
        """The learned temperature, clamped."""
        return self.log_temperature.exp().clamp(self.config.min_temperature, MAX_TEMPERATURE)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.start.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Type of the keys and values a user state keeps."""
        return torch.bfloat16 if self.precision == "bf16" else self.dtype

    def arithmetic(self) -> AbstractContextManager[object]:
        """Return the context in which user states are computed: autocast for bf16, nothing otherwise."""
        if self.precision == "bf16":
            return torch.autocast(self.start.device.type, torch.bfloat16)
        return nullcontext()

    @property
    def last_kind(self) -> LayerKind:
        """Kind of the last layer."""
        return self.config.layer_kinds[-1]

    @staticmethod
    def _block(module: nn.Module) -> Block:
        assert isinstance(module, Block)
        return module

    def _initialise(self) -> None:
        depth = len(self.blocks)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                ends_branch = name.endswith(("output", "down"))
                std = module.in_features**-0.5 * ((2 * depth) ** -0.5 if ends_branch else 1.0)
                nn.init.normal_(module.weight, std=std)
        nn.init.normal_(self.head.weight, std=self.config.dim**-0.5)
        if self.request is not None:
            nn.init.normal_(self.request.weight, std=0.1)


def _merge(new: Rows, earlier: Rows | None, place: Place, kind: LayerKind) -> Rows:
    if earlier is None:
        return new
    events = torch.cat((earlier.events, new.events))
    summaries = torch.cat((earlier.summaries, new.summaries)) if len(new.summaries) else earlier.summaries
    if (order := place.event_merge[kind]) is not None:
        events = events[order]
    if kind == "summary" and place.summary_merge is not None:
        summaries = summaries[place.summary_merge]
    return Rows(events, summaries)


def _check(config: ModelConfig, features: FeatureSchema) -> None:
    for name in config.side_features:
        if name not in features.side:
            have = ", ".join(features.side) or "none"
            raise ConfigError(
                f"model.side_features: expected side features of the data set ({have}), got {name!r}. "
                "Prepare the data with it, or leave it out."
            )
    if features.clock == "ordinal" and config.item_bias == "popularity-7d":
        raise ConfigError(
            "model.item_bias: expected none or learned on an ordinal clock, which has no days, got popularity-7d. "
            "Set it to learned."
        )
    if features.clock == "ordinal" and (config.use_gap or config.use_request_time):
        raise ConfigError(
            "model.use_gap, model.use_request_time: expected false on an ordinal clock, got true. Set both to false."
        )
