"""What every network shares, whatever reads the history: event inputs, and from a hidden row to scores.

A network gives one user vector a question; its product with an item's vector, plus the biases, is the item's score.
What lies between the inputs and the hidden rows is the architecture's (`Network`, or one of `recsys_ksa.baselines`), so
that a comparison compares architectures and nothing else.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ksa.config import ModelConfig
from recsys_ksa.errors import ConfigError
from recsys_ksa.features import NUM_GAP_BUCKETS, QuestionFeatures
from recsys_ksa.model.embeddings import NO_FEATURES, EventEmbedding
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.own_items import DAY, OwnItemBias
from recsys_ksa.model.popularity import Centre, PopularityBias
from recsys_ksa.schema import UNKNOWN_ITEM

if TYPE_CHECKING:
    from recsys_ksa.data.batches import Batch, QuestionRows

# Shapes: U users, T events, Q questions, I items, E model dim.

MAX_TEMPERATURE = 1.0


class ScoringNetwork(nn.Module):
    """Event inputs, request time, head, item vectors and biases; subclasses read histories."""

    max_length: int | None = None
    """Events of a history that are read, the newest; None: all."""

    def __init__(self, config: ModelConfig, features: FeatureSchema) -> None:
        """Create the shared parts with random parameters.

        Raises:
            ConfigError: the config asks for what the data set does not have.
        """
        super().__init__()
        _check(config, features)
        self.config = config
        self.features = features
        self.embedding = EventEmbedding(config, features)
        self.request = nn.Embedding(NUM_GAP_BUCKETS, config.dim) if config.use_request_time else None
        self.question = _question_table(QuestionFeatures.of(config, features.users).num_rows, config.dim)
        self.start = nn.Parameter(torch.randn(config.dim))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.dim, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())
        self.item_bias = nn.Parameter(torch.zeros(features.num_items)) if config.item_bias == "learned" else None
        self.popularity_bias = PopularityBias(features.num_items) if config.item_bias == "popularity-7d" else None
        self.centre = Centre(config.dim) if config.item_bias == "popularity-7d" else None
        self.own_items = OwnItemBias(1.0 if features.clock == "ordinal" else DAY) if config.own_item_bias else None
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.head.weight, std=config.dim**-0.5)
        if self.request is not None:
            nn.init.normal_(self.request.weight, std=0.1)

    def forward(self, batch: "Batch", attention_impl: str = "auto") -> Tensor:
        """Return one user vector a question, [Q, E] ([Q, E + 1] with an item bias); score = user . item."""
        raise NotImplementedError

    def embed(
        self,
        item_index: Tensor,
        event_type: Tensor | None,
        gap_bucket: Tensor,
        lengths: Tensor | Sequence[int],
        features: Mapping[str, Tensor] = NO_FEATURES,
    ) -> Tensor:
        """Return event inputs [T, E]; see `EventEmbedding.forward`. In training some items are hidden."""
        if self.training and self.config.item_dropout:
            hidden = torch.rand(item_index.shape, device=item_index.device) < self.config.item_dropout
            item_index = item_index.masked_fill(hidden, UNKNOWN_ITEM)
        return self.dropout(self.embedding(item_index, event_type, gap_bucket, lengths, features).to(self.dtype))

    def told(self, rows: "QuestionRows | None") -> Tensor | None:
        """Return what each question tells beside the history, [Q, E]; None where the network is told nothing."""
        if self.question is None:
            return None
        assert rows is not None
        return self.question(rows.row, rows.offsets, rows.weight.to(self.dtype))

    def starts(self, count: int, told: Tensor | None) -> Tensor:
        """Return the hidden rows of questions that know no event, [Q, E].

        Args:
            count: Q.
            told: of these questions, [Q, E].
        """
        return self.start.expand(count, -1) if told is None else self.start + told

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


def _question_table(num_rows: Mapping[str, int], dim: int) -> nn.EmbeddingBag | None:
    """Return the table of what questions tell; the first row of each feature, "none", begins as zeros."""
    if not num_rows:
        return None
    table = nn.EmbeddingBag(sum(num_rows.values()), dim, mode="sum", include_last_offset=True)
    nn.init.normal_(table.weight, std=0.1)
    with torch.no_grad():
        table.weight[[*accumulate(num_rows.values(), initial=0)][:-1]] = 0.0
    return table


def _check(config: ModelConfig, features: FeatureSchema) -> None:
    for name in config.side_features:
        if not any(name in known for known in (features.side, features.multi, features.vectors)):
            have = ", ".join([*features.side, *features.multi, *features.vectors]) or "none"
            raise ConfigError(
                f"model.side_features: expected side features of the data set ({have}), got {name!r}. "
                "Prepare the data with it, or leave it out."
            )
    for name in config.user_features:
        if name not in features.users:
            have = ", ".join(features.users) or "none"
            raise ConfigError(
                f"model.user_features: expected features of the data set's users ({have}), got {name!r}. "
                "Prepare the data with it (--users), or leave it out."
            )
        if (features.users[name].kind == "number") != (name in config.user_edges):
            raise ConfigError(
                f"model.user_edges: expected edges of the user features that are numbers, and of no other; "
                f"{name!r} is a {features.users[name].kind}."
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
    if features.clock == "ordinal" and (config.calendar or config.request_calendar or config.session_gap is not None):
        raise ConfigError(
            "model.calendar, model.request_calendar, model.session_gap: expected none on an ordinal clock: it has "
            "no seconds. Leave them out."
        )
