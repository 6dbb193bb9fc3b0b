"""Typed configuration of a run: frozen pydantic models. Torch-free."""

from itertools import pairwise
from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from recsys_ksa.config_files import Strict
from recsys_ksa.config_files import dump_config as dump_config
from recsys_ksa.config_files import load_config as load_config
from recsys_ksa.config_files import parse_config as parse_config
from recsys_ksa.features.calendar import CalendarFeature

LayerKind = Literal["summary", "full"]
TrainingSpan = Literal["any", "loo", "loo-classic", "global"]


class ModelConfig(Strict):
    """The network (design: events, chunks, summary tokens, window)."""

    architecture: Literal["ksa", "sasrec", "hstu", "mean-pooled", "segment-tokens"] = "ksa"
    """`ksa`: the network described here. The others are for comparison (`recsys_ksa.baselines`): they keep no state."""
    max_positions: PositiveInt = 512
    """Events that `sasrec` and `hstu` read, the newest; their positions are learned. Of no meaning to the others."""
    dim: PositiveInt = 64
    """Width of the residual stream and of item vectors."""
    num_heads: PositiveInt = 2
    """Query heads."""
    num_kv_heads: PositiveInt = 2
    """Key and value heads; divides `num_heads` (grouped-query attention)."""
    head_dim: PositiveInt = 32
    """Width of one head; even (rotary)."""
    feed_forward_dim: PositiveInt = 128
    """Hidden width of the SwiGLU feed-forward."""
    layers: tuple[LayerKind, ...] = ("summary", "summary")
    """Kind of each layer, first to last: `summary` or `full` (plain causal over events)."""
    chunk_size: PositiveInt = 16
    """Event tokens a chunk (k)."""
    summaries_per_chunk: PositiveInt = 1
    """Summary tokens a closed chunk (m)."""
    window_chunks: NonNegativeInt = 4
    """Previous chunks an event still sees as events (W)."""
    max_visible_chunks: NonNegativeInt | None = None
    """How many chunks before the window are seen through their summaries (V); unset: all."""
    attention: Literal["summary", "full", "window"] = "summary"
    """`summary`: as `layers` says. `full`: every layer full. `window`: the window alone, no summaries."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout on inputs and on each block's two branches, in training."""
    item_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of events whose item is hidden from the input in training, as an unknown item would be."""
    side_features: tuple[str, ...] = ()
    """Categorical columns of items.parquet added to each event's input."""
    use_event_type: bool = True
    """Add the event type to the input where the data set has one."""
    use_gap: bool = True
    """Add the bucketed time since the previous event to the input; needs a clock that is not ordinal."""
    calendar: tuple[CalendarFeature, ...] = ()
    """Add the `hour` of the day and the `weekday` (UTC) of an event to its input; needs a clock that is not ordinal."""
    session_gap: PositiveInt | None = None
    """Add how far into its session an event lies; a longer pause, in seconds, begins a session. Unset: no sessions."""
    value_edges: tuple[float, ...] = ()
    """Add the bucket of an event's value between these edges, ascending; none: values are not looked at."""
    use_request_time: bool = True
    """Let the last block and the head know when the recommendation is asked for."""
    request_calendar: tuple[CalendarFeature, ...] = ()
    """Let the last block know the `hour` of the day and the `weekday` (UTC) of the request; needs such a clock, too."""
    user_features: tuple[str, ...] = ()
    """Features of users.parquet that the last block knows of whom it answers."""
    user_edges: dict[str, tuple[float, ...]] = {}
    """Of those that are numbers: the edges of their buckets, ascending."""
    item_vectors: Literal["tied", "untied", "content"] = "tied"
    """`tied`: the input item table; `untied`: a table of their own; `content`: input row plus side features."""
    item_bias: Literal["none", "learned", "popularity-7d"] = "none"
    """An extra dimension of item vectors that unit vectors cannot express. `learned`: one number an item.
    `popularity-7d`: learned, too, from how often the item was met in the days before the question; needs a clock with
    days."""
    own_item_bias: bool = False
    """Add a learned function of count, recency and rhythm to the scores of items the user already had."""
    temperature: PositiveFloat = 0.05
    """Initial temperature of the cosine head; learned, clamped to [min_temperature, 1]."""
    min_temperature: PositiveFloat = 0.01
    """Lowest temperature: how sharp a softmax over cosines may become; a regulariser on small data."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if not self.min_temperature <= self.temperature <= 1:
            raise ValueError(f"temperature {self.temperature} must lie in [min_temperature {self.min_temperature}, 1]")
        if self.chunk_size < 2:
            raise ValueError(f"chunk_size must be at least 2, got {self.chunk_size}")
        if not self.layers:
            raise ValueError("layers must name at least one layer")
        if any(low >= high for low, high in pairwise(self.value_edges)):
            raise ValueError(f"value_edges must ascend, got {list(self.value_edges)}")
        for key in ("calendar", "request_calendar", "user_features"):
            if len(set(names := getattr(self, key))) != len(names):
                raise ValueError(f"{key} must name each feature once, got {list(names)}")
        for name, edges in self.user_edges.items():
            if name not in self.user_features:
                raise ValueError(f"user_edges: expected names of user_features, got {name!r}")
            if not edges or any(low >= high for low, high in pairwise(edges)):
                raise ValueError(f"user_edges.{name} must ascend and have at least one, got {list(edges)}")
        return self

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The layers after `attention` is applied."""
        return tuple("full" for _ in self.layers) if self.attention == "full" else self.layers


class DataConfig(Strict):
    """What of the data set is trained on."""

    split: TrainingSpan = "any"
    """Training span: all but the test and validation events of this protocol; `any`: of all protocols."""
    max_length: PositiveInt = 512
    """Events of a history trained on, the newest; cut at a chunk boundary, true positions kept."""
    stochastic_length: float | None = Field(default=None, gt=0.0, le=2.0)
    """HSTU's alpha: a history longer than max_length^(alpha / 2) is read whole with probability max_length^alpha / n^2,
    else its newest max_length^(alpha / 2) events, drawn anew each epoch. Unset: always up to `max_length`."""
    shuffle_events: PositiveInt | None = None
    """Events of histories shuffled together, for data sets larger than memory. Unset: all."""


class LossConfig(Strict):
    """What a question's answer is compared with."""

    kind: Literal["sampled-softmax", "full-softmax", "gbce"] = "sampled-softmax"
    """`full-softmax` never holds a [questions, items] tensor; it needs the item table whole on one device."""
    num_negatives: PositiveInt = 1024
    """Sampled items shared by a batch (sampled-softmax, gbce)."""
    popularity_power: float = Field(default=0.5, ge=0.0, le=1.0)
    """Negatives are drawn in proportion to count ** power; corrected by log q."""
    targets: Literal["next-event", "next-set"] = "next-event"
    """`next-event`: each event is asked for from all before it. `next-set`: all events of the next distinct
    timestamp are asked for together, from strictly earlier ones (baskets)."""
    questions_per_user: PositiveInt = 128
    """At most this many questions of a history in one step, drawn anew each epoch."""
    request_time: Literal["target", "drawn"] = "target"
    """Request time shown in training: the target's, or an integer drawn uniformly between last event and target."""
    request_time_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of questions asked without a request time."""
    user_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of questions that tell nothing of the user, where `model.user_features` are on."""
    gbce_calibration: float = Field(default=0.75, ge=0.0, le=1.0)
    """gBCE's t (gSASRec, arXiv 2308.07192)."""


class TrainConfig(Strict):
    """The optimiser, its schedule, and when to stop."""

    batch_tokens: PositiveInt = 8192
    """Event tokens a batch."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of matrices; none on tables, norms and biases."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up."""
    max_steps: NonNegativeInt = 2000
    """Steps of the whole schedule; 0 writes a random model."""
    max_seconds: PositiveFloat | None = None
    """Stop, whatever the step, before training has taken longer, validation included; the schedule ignores it."""
    final_learning_rate: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak (cosine decay)."""
    gradient_clip: PositiveFloat = 1.0
    """Largest global norm of the gradient."""
    validate_every: PositiveInt = 200
    """Steps between validations."""
    validation_users: PositiveInt = 1000
    """At most this many users, a fixed draw, validate."""
    patience: PositiveInt = 5
    """Validations without a better NDCG@10 before stopping; the best weights are kept."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints from which `--resume` goes on."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of matrix products; bf16 on CUDA only. Parameters stay float32."""
    loader_processes: NonNegativeInt = 0
    """Processes that build batches ahead; 0: a thread does. What is trained on is the same."""
    attention_impl: Literal["auto", "reference", "torch", "triton"] = "auto"
    """Implementation of summary attention; `auto` picks by device and says which."""


class EvaluateConfig(Strict):
    """Defaults that evaluation and serving take from the run."""

    exclude_seen: bool = False
    """Whether items the user already had are left out of answers."""


class RunConfig(Strict):
    """A whole run, as one TOML file holds it."""

    name: str = "ksa"
    """What the run is called in reports."""
    seed: NonNegativeInt = 0
    """Seed of parameters, batches, negatives and drawn times."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
