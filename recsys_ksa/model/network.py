"""The whole network, in the order data flows: events -> tokens -> blocks -> user vectors -> scores.

Training, evaluation and user states share one path. A pass takes new event tokens and, optionally, the rows (keys
and values) that earlier events left behind; training is a pass without earlier rows. The request time, and what else
a question tells (`features.questions`), enter only the query and the residual of the last block, so no row ever
depends on them. Passes over a few events take the same
parameters through NumPy (`few_events`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from recsys_ksa.config import LayerKind, ModelConfig
from recsys_ksa.model.array_block import ArrayBlock, ArrayNetwork, array_of
from recsys_ksa.model.block import Block, attend
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.place import Place, place_histories
from recsys_ksa.model.rotary import Rotary
from recsys_ksa.model.scoring import ScoringNetwork

if TYPE_CHECKING:
    from ksa_kernels import ChunkLayout
    from recsys_ksa.data.batches import Batch

# Shapes: U users, T events, S summaries, Q questions, I items, E model dim, D head dim.


class SeenRows(Protocol):
    """Keys and values of one layer, wherever they are kept."""

    def attend(self, query: Tensor, summary_query: Tensor, layout: "ChunkLayout", impl: str) -> tuple[Tensor, Tensor]:
        """Return what queries [Tq, H, D] and [Sq, H, D] see in them, of the same shapes."""
        ...


@dataclass(frozen=True)
class Rows:
    """Keys and values of one layer: events [T, 2, H_kv, D] and summaries [S, 2, H_kv, D], jagged by user."""

    events: Tensor
    summaries: Tensor

    def attend(self, query: Tensor, summary_query: Tensor, layout: "ChunkLayout", impl: str) -> tuple[Tensor, Tensor]:
        """Return what the queries see in them: see `SeenRows`."""
        return attend(query, self.events, summary_query, self.summaries, layout, impl)


Keep = Callable[[int, LayerKind, Rows], SeenRows]
"""Given a layer's number, its kind and its new rows, returns all that its queries may see."""


@dataclass(frozen=True)
class EarlierRows:
    """Rows of one layer that earlier events left: for each user the tensors that make them up, oldest first."""

    events: Sequence[Sequence[Tensor]]
    summaries: Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Encoded:
    """What a pass leaves.

    last_input: the last block's input of each new event, [T, E].
    rows: every layer's rows as its queries see them: each user's earlier ones, then its new ones; none where something
        else keeps them.
    """

    last_input: Tensor
    rows: list[Rows]


class Network(ScoringNetwork):
    """The recommender network (design: one residual stream of event tokens, one of summary tokens)."""

    def __init__(
        self, config: ModelConfig, features: FeatureSchema, precision: Literal["float32", "bf16"] = "float32"
    ) -> None:
        """Create the network with random parameters; `precision` is that of user states' matrix products."""
        super().__init__(config, features)
        self.precision = precision
        self.summary_input = nn.Parameter(torch.randn(config.summaries_per_chunk, config.dim))
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.layer_kinds)
        self._arrays: tuple[int, ArrayNetwork | None] | None = None

    def forward(self, batch: "Batch", attention_impl: str = "auto") -> Tensor:
        """Return one user vector a question, [Q, E] ([Q, E + 1] with an item bias); score = user . item."""
        place = place_histories(
            self.config, batch.offsets, batch.first_position, self.start.device, self.dtype, unseen_summaries=False
        )
        lengths = batch.offsets.diff()
        events = self.embed(batch.item_index, batch.event_type, batch.gap_bucket, lengths, batch.features)
        encoded = self.encode(events, place, attention_impl)
        known = batch.question_row >= 0
        row = batch.question_row.clamp(min=0)
        bucket = torch.zeros(len(events), dtype=torch.int64, device=events.device)
        bucket[row[known]] = batch.request_bucket[known]
        layout = place.layouts[self.last_kind]
        told = self.told(batch.told)
        starts = self.starts(len(row), told)
        if len(events):
            told = None if told is None else told.new_zeros(events.shape).index_put((row[known],), told[known])
            hidden = self.answer(
                encoded.last_input, bucket, encoded.rows[-1], layout, place.event_rotary, row, attention_impl, told
            )
            hidden = torch.where(known[:, None], hidden, starts)
        else:
            hidden = starts
        return self.user_vectors(hidden)

    # --- events -> tokens -> blocks ---

    def encode(
        self,
        events: Tensor,
        place: Place,
        attention_impl: str = "auto",
        earlier: Sequence[EarlierRows] | None = None,
        fixed: Sequence[Rows | None] | None = None,
        keep: Keep | None = None,
    ) -> Encoded:
        """Run all blocks but the last one's queries.

        Args:
            events: inputs of the new events, [T, E].
            place: where they sit.
            earlier: each layer's rows of earlier events and summaries; none in training.
            fixed: each layer's rows known beforehand, in the layout's order, used in place of those computed here:
                summaries of a `summary` layer, events of a `full` one (replay of a stored state).
            keep: what keeps the rows of earlier events and takes the new ones, in place of the two above.
        """
        summaries = self.summary_input[place.summary_slot]
        closing = len(summaries) > 0  # most arrivals close no chunk
        rows: list[Rows] = []

        def seen_rows(depth: int, kind: LayerKind, new: Rows) -> SeenRows:
            if keep is not None:
                return keep(depth, kind, new)
            rows.append(_merge(new, kind, depth, place, earlier, fixed))
            return rows[-1]

        *blocks, last = (self._block(module) for module in self.blocks)
        for depth, block in enumerate(blocks):
            query, gate, event_rows = block.event(events, place.event_rotary, attention_impl)
            summary_query, summary_gate, summary_rows = query[:0], gate[:0], event_rows[:0]
            if closing and block.summary is not None:
                summary_query, summary_gate, summary_rows = block.summary(
                    summaries, place.summary_rotary, attention_impl
                )
            known = seen_rows(depth, block.kind, Rows(event_rows, summary_rows))
            seen, summary_seen = known.attend(query, summary_query, place.layouts[block.kind], attention_impl)
            events = block.finish(events, seen, gate, attention_impl)
            if closing and block.summary is not None:
                summaries = block.finish(summaries, summary_seen, summary_gate, attention_impl)
        event_rows = last.event.keys_values(events, place.event_rotary, attention_impl)
        summary_rows = event_rows[:0]
        if closing and last.summary is not None:
            summary_rows = last.summary.keys_values(summaries, place.summary_rotary, attention_impl)
        seen_rows(len(blocks), last.kind, Rows(event_rows, summary_rows))
        return Encoded(events, rows)

    def answer(
        self,
        last_input: Tensor,
        request_bucket: Tensor,
        rows: SeenRows,
        layout: "ChunkLayout",
        rotary: Rotary,
        select: Tensor | None = None,
        attention_impl: str = "auto",
        told: Tensor | None = None,
    ) -> Tensor:
        """Run the last block where something is asked. Returns [Q, E] for the selected rows (all if None).

        Args:
            last_input: the last block's input of the layout's query events, [T, E].
            request_bucket: int64 [T].
            rows: the last layer's keys and values.
            layout, rotary: of the query events.
            select: int64 [Q] into the query events.
            told: what the question asked from each event tells beside the history, [T, E].
        """
        block = self._block(self.blocks[-1])
        asked = last_input if self.request is None else last_input + self.request(request_bucket)
        asked = asked if told is None else asked + told
        query, gate = block.event.queries(asked, rotary, attention_impl)
        unused = query.new_zeros(layout.num_query_summaries, *query.shape[1:])
        seen, _ = rows.attend(query, unused, layout, attention_impl)
        if select is not None:
            asked, seen, gate = asked[select], seen[select], gate[select]
        return block.finish(asked, seen, gate, attention_impl)

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
    def arrays(self) -> ArrayNetwork | None:
        """The parameters as NumPy sees them, the same memory; None where it does not (GPU, half precision, shards).

        Kept, and looked up again where the parameters have moved (`to`, a copy of the network).
        """
        where = self.summary_input.data_ptr()
        if self._arrays is None or self._arrays[0] != where:
            self._arrays = where, self._as_arrays()
        return self._arrays[1]

    @property
    def last_kind(self) -> LayerKind:
        """Kind of the last layer."""
        return self.config.layer_kinds[-1]

    def _as_arrays(self) -> ArrayNetwork | None:
        tables = self.embedding.whole_tables()
        if tables is None or self.start.device.type != "cpu" or self.dtype not in (torch.float32, torch.float64):
            return None
        return ArrayNetwork(
            tables={name: array_of(table) for name, table in tables.items()},
            blocks=[ArrayBlock.of(self._block(block)) for block in self.blocks],
            summary_input=array_of(self.summary_input),
            request=None if self.request is None else array_of(self.request.weight),
        )

    @staticmethod
    def _block(module: nn.Module) -> Block:
        assert isinstance(module, Block)
        return module


def _merge(
    new: Rows,
    kind: LayerKind,
    depth: int,
    place: Place,
    earlier: Sequence[EarlierRows] | None,
    fixed: Sequence[Rows | None] | None,
) -> Rows:
    """Return the rows that a layer's queries may see: each user's earlier ones, then its new ones."""
    events, summaries = new.events, new.summaries
    if earlier is not None:
        before = earlier[depth]
        if kind == "summary" and len(place.new_events) == 1:
            # One tensor, events first: an event attends to its window and the summaries behind it in place.
            joined = torch.cat((*before.events[0], events, *before.summaries[0], summaries))
            counts = place.layouts[kind].num_key_events, place.layouts[kind].num_key_summaries
            events, summaries = joined.split_with_sizes(counts)
        else:
            events = _behind(before.events, events, place.new_events)
            if kind == "summary":
                summaries = _behind(before.summaries, summaries, place.new_summaries)
    if fixed is not None and (known := fixed[depth]) is not None:
        return Rows(events, known.summaries) if kind == "summary" else known
    return Rows(events, summaries)


def _behind(earlier: Sequence[Sequence[Tensor]], new: Tensor, counts: Sequence[int]) -> Tensor:
    """Return each user's earlier rows and the new ones, of which it has `counts`, in a tensor of its own."""
    news = [new] if len(counts) == 1 else new.split(list(counts))
    return torch.cat([part for parts, own in zip(earlier, news, strict=True) for part in (*parts, own)])
