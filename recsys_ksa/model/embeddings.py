"""Event inputs through TorchRec: one EmbeddingCollection holds every table.

The item table serves two features: `item`, the event's own, and `candidate`, the items a loss scores; so one
table, sharded or not, is looked up both ways.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_ksa.config import ModelConfig
from recsys_ksa.features import NUM_GAP_BUCKETS, EventFeatures
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.item_content import ItemContent

CANDIDATE = "candidate"
CONTENT = "content"
"""What an item's lists and vectors add, as if it were a table."""
NO_FEATURES: Mapping[str, Tensor] = MappingProxyType({})

# TorchRec's jagged tensors ask torch.fx a question that warns each process once; it says nothing to our users.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


class EventEmbedding(nn.Module):
    """Sum of an event's embeddings: item, event type, side features, bucketed gap, and what else is on."""

    def __init__(self, config: ModelConfig, features: FeatureSchema) -> None:
        super().__init__()
        self.dim = config.dim
        self.has_event_type = config.use_event_type and features.num_event_types > 0
        self.has_gap = config.use_gap
        self.side = tuple(name for name in config.side_features if name in features.side)
        self.item_content = ItemContent(config, features)
        self.content = config.item_vectors == "content"
        self.untied = config.item_vectors == "untied"
        rows = {"item": features.num_items}
        if self.has_event_type:
            rows["event_type"] = features.num_event_types
        if self.has_gap:
            rows["gap"] = NUM_GAP_BUCKETS
        self.event_features = EventFeatures.of(config)
        rows |= self.event_features.num_rows
        for name in self.side:
            rows[f"side_{name}"] = features.side[name].num_categories
            category = torch.from_numpy(features.side[name].category.astype("int64"))
            self.register_buffer(f"category_{name}", category, persistent=False)
        rows |= self.item_content.num_rows
        names = {table: [table] for table in rows}
        if self.untied:
            rows["candidate_item"] = features.num_items
            names["candidate_item"] = [CANDIDATE]
        else:
            names["item"].append(CANDIDATE)
        if self.content:
            for name in self.side:
                names[f"side_{name}"].append(f"{CANDIDATE}_{name}")
            for table in self.item_content.num_rows:
                names[table].append(f"{CANDIDATE}_{table}")
        scale = config.dim**-0.5

        def init(weight: Tensor) -> Tensor:
            with torch.no_grad():
                weight.normal_(std=scale)[0] = 0.0  # row 0 is the unknown item or category: it adds nothing
            return weight

        self.tables = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=table,
                    embedding_dim=config.dim,
                    num_embeddings=count,
                    feature_names=names[table],
                    init_fn=init,
                )
                for table, count in rows.items()
            ]
        )
        self.table_of = {name: table for table in rows for name in names[table]}
        self.keys = list(self.table_of)

    def forward(
        self,
        item_index: Tensor,
        event_type: Tensor | None,
        gap_bucket: Tensor,
        lengths: Tensor | Sequence[int],
        features: Mapping[str, Tensor] = NO_FEATURES,
    ) -> Tensor:
        """Return event inputs of about unit elements, [T, E].

        Args:
            item_index, event_type, gap_bucket: int64 [T]; what the network does not use is not looked at.
            lengths: [U], events of each user.
            features: int64 [T] each, by name: those of `EventFeatures` that are on.
        """
        ids = self.ids(item_index, event_type, gap_bucket, features)
        ids.pop(CONTENT, None)
        lists, counts = self.item_content.ids(item_index)
        found = self._look_up(ids | lists, lengths, counts)
        total, *others = (found[name] for name in ids)
        for rows in others:
            total = total + rows
        if self.item_content:
            total = total + self.item_content(item_index, found, counts)
        return total * math.sqrt(self.dim)

    def ids(
        self, item_index: Tensor, event_type: Tensor | None, gap_bucket: Tensor, features: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the rows of `whole_tables` that an event's input is the sum of, int64 [T] by feature.

        Arguments are those of `forward`.
        """
        ids = {"item": item_index}
        if self.has_event_type:
            ids["event_type"] = event_type if event_type is not None else torch.zeros_like(item_index)
        if self.has_gap:
            ids["gap"] = gap_bucket
        for name in self.event_features.num_rows:
            ids[name] = features[name]
        for name in self.side:
            ids[f"side_{name}"] = self._category(name)[item_index]
        if self.item_content:
            ids[CONTENT] = item_index
        return ids

    def whole_tables(self) -> dict[str, Tensor] | None:
        """Return the table of each feature, [rows, E]; None where tables are sharded.

        What lists and vectors add to each item is worked out here, once for all.
        """
        if not isinstance(self.tables, EmbeddingCollection):
            return None
        tables = {key: self._table(table).weight for key, table in self.table_of.items()}
        return tables | {CONTENT: self._all_content().detach()} if self.item_content else tables

    def candidates(self, item_index: Tensor) -> Tensor:
        """Return the rows by which items are scored, before normalisation. int64 [C] -> [C, E]."""
        ids = {CANDIDATE: item_index}
        if self.content:
            ids |= {f"{CANDIDATE}_{name}": self._category(name)[item_index] for name in self.side}
        lists, counts = self.item_content.ids(item_index) if self.content else ({}, {})
        named = {f"{CANDIDATE}_{table}": rows for table, rows in lists.items()}
        sizes = {f"{CANDIDATE}_{table}": count for table, count in counts.items()}
        found = self._look_up(ids | named, [item_index.numel()], sizes)
        total = sum((found[name] for name in ids), start=torch.zeros((), device=item_index.device))
        if self.content and self.item_content:
            own = {table: found[f"{CANDIDATE}_{table}"] for table in lists}
            total = total + self.item_content(item_index, own, counts)
        return total

    def all_candidates(self) -> Tensor:
        """Return `candidates` of every item row, [I, E]; needs the tables whole on this device."""
        rows = self._table("candidate_item" if self.untied else "item").weight
        if self.content:
            for name in self.side:
                rows = rows + self._table(f"side_{name}").weight[self._category(name)]
            if self.item_content:
                rows = rows + self._all_content()
        return rows

    def _all_content(self) -> Tensor:
        """Return what lists and vectors add to each item, [I, E]."""
        everyone = torch.arange(self._table("item").num_embeddings, device=self._table("item").weight.device)
        lists, counts = self.item_content.ids(everyone)
        found = {table: self._table(table)(rows) for table, rows in lists.items()}
        return self.item_content(everyone, found, counts)

    def _table(self, name: str) -> nn.Embedding:
        table = self.tables.embeddings[name]
        assert isinstance(table, nn.Embedding)
        return table

    def _category(self, name: str) -> Tensor:
        return self.get_buffer(f"category_{name}")

    def _look_up(
        self, ids: dict[str, Tensor], lengths: Tensor | Sequence[int], counts: Mapping[str, Tensor] = NO_FEATURES
    ) -> dict[str, Tensor]:
        """Look up the features given; the collection's other features are empty.

        Args:
            ids: table rows by feature.
            lengths: [U], events of each user.
            counts: for features of several rows an event, how many each event has, int64 [T].
        """
        if not self.training and isinstance(self.tables, EmbeddingCollection):
            # Whole tables, nothing to learn: the same rows without a jagged tensor's bookkeeping, which would be a
            # tenth of appending one event.
            return {key: self._table(self.table_of[key])(ids[key]) for key in ids}
        values = torch.cat([ids[key] for key in self.keys if key in ids])
        lengths = torch.as_tensor(lengths, device=values.device)
        nothing = torch.zeros_like(lengths)
        jagged = KeyedJaggedTensor(
            keys=self.keys,
            values=values,
            lengths=torch.cat(
                [
                    (_by_user(counts[key], lengths) if key in counts else lengths) if key in ids else nothing
                    for key in self.keys
                ]
            ),
            length_per_key=[ids[key].numel() if key in ids else 0 for key in self.keys],
        )
        found = self.tables(jagged)
        return {key: found[key].values() for key in ids}


def _by_user(counts: Tensor, lengths: Tensor) -> Tensor:
    """Return the sum of each user's events' counts. int64 [T], [U] -> [U]."""
    reach = torch.nn.functional.pad(counts.cumsum(0), (1, 0))[lengths.cumsum(0)]
    return reach.diff(prepend=reach.new_zeros(1))
