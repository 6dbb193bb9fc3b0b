"""Training, top to bottom: data set and config in, run directory out."""

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from recsys_ksa.architectures import build_network, check_length
from recsys_ksa.config import RunConfig
from recsys_ksa.data.batches import Batch
from recsys_ksa.data.negatives import NegativeSampler, training_counts
from recsys_ksa.data.popularity import DayCounts
from recsys_ksa.data.spans import training_end
from recsys_ksa.data.training_batches import TrainingBatches
from recsys_ksa.errors import ConfigError, RunError
from recsys_ksa.model.losses import batch_loss, check_loss
from recsys_ksa.model.popularity import LEVEL, Popularity
from recsys_ksa.model.scoring import ScoringNetwork
from recsys_ksa.run import METRICS_FILE
from recsys_ksa.train.checkpoint import Progress, Weights, copy_weights, load_checkpoint, save_checkpoint
from recsys_ksa.train.feed import Feed, Place, Source, feed
from recsys_ksa.train.optim import learning_rate, make_optimizer
from recsys_ksa.train.ranks import Ranks
from recsys_ksa.train.run_files import begin_run, feature_schema, finish_run, reopen_run
from recsys_ksa.train.validation import Validation

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset

LOG_EVERY = 10
"""Steps between rows of metrics.jsonl; reading the loss waits for the device."""


@dataclass(frozen=True)
class Speed:
    """How fast this session's steps were, validation and checkpoints left out; zeros without steps."""

    tokens_per_second: float
    """Event tokens."""
    waiting_share: float
    """Share of the time in which the next batch was waited for, the first one left out. On a device that works beside
    the host, an upper bound of how long it had nothing to do."""

    @staticmethod
    def of(tokens: int, seconds: float, waited: float) -> "Speed":
        """Return the speed of `tokens` in `seconds` of which `waited` were spent waiting."""
        return Speed(tokens / seconds, waited / seconds) if seconds else Speed(0.0, 0.0)


@dataclass(frozen=True)
class Report:
    """What training tells while it runs."""

    step: int
    steps: int
    seconds: float
    loss: float
    speed: "Speed"
    ndcg: float
    """Best validation NDCG@10 so far; -1 before the first."""


@dataclass(frozen=True)
class Trained:
    """How training ended."""

    progress: Progress
    speed: "Speed"
    num_parameters: int
    reason: str
    """Why it stopped."""


def train(
    config: RunConfig,
    dataset: "Dataset",
    run: Path,
    *,
    device: torch.device,
    stop_at: int | None = None,
    resume: bool = False,
    report: Callable[[Report], None] = lambda report: None,
    ranks: Ranks = Ranks(),  # noqa: B008  frozen
) -> Trained:
    """Train a network and write its run directory.

    Args:
        config: resolved (`resolve_config`).
        dataset: opened.
        run: directory to write.
        device: where the network trains.
        stop_at: stop after so many steps in all, the schedule still that of `train.max_steps`; 0 writes a random
            model.
        resume: go on from the run's last checkpoint, on the trajectory it would have taken.
        report: called every `LOG_EVERY` steps.
        ranks: the processes that train together, of which each calls this; all see one file system.

    Raises:
        ConfigError: the config contradicts itself, the data or the device.
        RunError: the directory is taken, cannot be resumed, or the loss is no longer finite.
    """
    _check(config, device)
    steps = config.train.max_steps if stop_at is None else stop_at
    if steps > config.train.max_steps:
        config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": steps})})

    torch.manual_seed(config.seed)
    network = build_network(config.model, feature_schema(dataset, config)).to(device)
    check_length(config, network)
    optimizer = make_optimizer(network, config.train)
    end = training_end(dataset, config.data.split)
    batches = TrainingBatches(dataset.histories, end, config, rank=ranks.rank, world_size=ranks.world_size)
    counts = training_counts(dataset.histories, end, dataset.num_items)
    # gBCE's calibration assumes uniform negatives.
    power = 0.0 if config.loss.kind == "gbce" else config.loss.popularity_power
    sampler = NegativeSampler(counts, power, config.seed)
    if config.model.item_bias == "learned":
        _start_item_bias(network, torch.from_numpy(counts))
    popularity = None
    if network.popularity_bias is not None:
        # Of the training span alone: what is held out must not be counted either.
        popularity = Popularity(DayCounts.of_histories(dataset.histories, end), dataset.num_items).to(device)
    if ranks.is_first:
        if resume:
            reopen_run(run, config, dataset)
        else:
            begin_run(run, config, dataset)
    progress, best = Progress(world_size=ranks.world_size), None
    if resume:
        progress, best = load_checkpoint(run, network, optimizer, ranks.world_size)
        if ranks.is_first:
            _cut_metrics(run, progress.step)
    objective = ranks.parallel(_Objective(network, config, sampler.log_probability.to(device), popularity))
    session = _Session(config, run, network, objective, optimizer, device, report, steps, ranks)
    progress, best, reason, speed = session.go(Validation(dataset, config), batches, sampler, progress, best)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    weights = best if best is not None else copy_weights(network)
    network = network.to("cpu")
    network.load_state_dict(weights)
    if ranks.is_first:
        finish_run(run, config, dataset, network, weights, batches.longest)
    return Trained(progress, speed, num_parameters, reason)


def resolve_config(config: RunConfig, dataset: "Dataset") -> tuple[RunConfig, list[str]]:
    """Return the config as this data set allows it, and a sentence for each thing that was changed.

    An ordinal clock has no seconds: gap inputs and request times are switched off.
    """
    if dataset.manifest.clock != "ordinal":
        return config, []
    off = [key for key in ("use_gap", "use_request_time") if getattr(config.model, key)]
    model = config.model.model_copy(update=dict.fromkeys(off, False))
    said = [f"model.{key} = false: the data set's clock is ordinal, it has an order but no seconds" for key in off]
    return config.model_copy(update={"model": model}), said


class _Objective(nn.Module):
    """The network and the loss of a batch, as one module."""

    def __init__(
        self, network: ScoringNetwork, config: RunConfig, log_probability: torch.Tensor, popularity: Popularity | None
    ) -> None:
        super().__init__()
        self.network = network
        self._config, self._log_probability, self._popularity = config, log_probability, popularity

    def forward(self, batch: Batch, negatives: torch.Tensor) -> torch.Tensor:
        """Return the mean over the batch's questions."""
        train, device = self._config.train, negatives.device
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            users = self.network(batch, train.attention_impl)
        loss, log_probability = self._config.loss, self._log_probability
        return batch_loss(self.network, users, batch, loss, negatives, log_probability, self._popularity)


@dataclass
class _Session:
    """The loop over steps, from wherever the run stands to where it stops."""

    config: RunConfig
    run: Path
    network: ScoringNetwork
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    report: Callable[[Report], None]
    steps: int
    ranks: Ranks

    def go(
        self,
        validation: Validation,
        batches: TrainingBatches,
        sampler: NegativeSampler,
        progress: Progress,
        best: Weights | None,
    ) -> tuple[Progress, Weights | None, str, "Speed"]:
        """Return progress, the best weights, why it stopped, and how fast it went."""
        config = self.config.train
        began = time.monotonic() - progress.seconds
        validated_for, trained_for, waited, tokens = 0.0, 0.0, 0.0, 0
        source = Source(batches, sampler, self.config.loss.num_negatives)
        first = Place(progress.step, progress.epoch, progress.position)
        inputs = feed(source, first, self.device, config.loader_processes)
        self.network.train()
        with closing(inputs):  # pyright: ignore[reportArgumentType]
            while True:
                budget = None if config.max_seconds is None else max(config.max_seconds - validated_for, 1e-3)
                if (reason := self._why_stop(progress, budget)) is not None:
                    break
                started = time.monotonic()
                given = next(inputs)
                waited += time.monotonic() - started
                rate = learning_rate(config, progress.step)
                num_questions, num_events = self.ranks.total(given.batch.num_questions, given.batch.num_events)
                loss = self._step(given, progress.step, rate, given.batch.num_questions / num_questions)
                progress = replace(
                    progress,
                    step=progress.step + 1,
                    epoch=given.next_epoch,
                    position=given.next_position,
                    tokens=progress.tokens + int(num_events),
                )
                if progress.step % LOG_EVERY == 0:
                    speed = Speed.of(tokens, trained_for, waited)
                    (whole,) = self.ranks.total(float(loss))
                    self._log(progress, whole, rate, speed)
                trained_for += time.monotonic() - started
                if not tokens:
                    waited = 0.0  # for the first batch there is nothing to do meanwhile
                tokens += int(num_events)
                progress = replace(progress, seconds=self._seconds(began))
                if progress.step % config.validate_every == 0:
                    started = time.monotonic()
                    progress, best = self._validate(validation, progress, best)
                    validated_for = time.monotonic() - started
                if progress.step % config.checkpoint_every == 0:
                    self._save(best, progress)
                progress = replace(progress, seconds=self._seconds(began))
        self._save(best, progress)
        # The closing validation comes after the checkpoint: a run resumed from here must not have made it.
        if progress.step and progress.step % config.validate_every:
            progress, best = self._validate(validation, progress, best, closing=True)
        return progress, best, reason, Speed.of(tokens, trained_for, waited)

    def _seconds(self, began: float) -> float:
        """Return the seconds since; where they decide how long to train, all processes' by one clock."""
        seconds = time.monotonic() - began
        return seconds if self.config.train.max_seconds is None else self.ranks.first(seconds)

    def _save(self, best: Weights | None, progress: Progress) -> None:
        if self.ranks.is_first:
            save_checkpoint(self.run, self.network, self.optimizer, best, progress)

    def _why_stop(self, progress: Progress, budget: float | None) -> str | None:
        config = self.config.train
        if progress.step >= self.steps:
            return f"{progress.step} steps done"
        if budget is not None and progress.seconds >= budget:
            return f"train.max_seconds {config.max_seconds:g} used"
        if progress.worse >= config.patience:
            return f"no better validation in {progress.worse}"
        return None

    def _step(self, given: Feed, step: int, rate: float, share: float) -> torch.Tensor:
        """Take a step; return this process' part of the loss, which is its mean over questions by their share."""
        config, ranks = self.config, self.ranks
        # Seeded by step: dropout after resuming is what it would have been.
        torch.manual_seed((config.seed << 32) + step * ranks.world_size + ranks.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = given.batch.to(self.device)
        negatives = given.negatives.to(self.device, non_blocking=True)
        loss = self.objective(batch, negatives) * share
        self.optimizer.zero_grad(set_to_none=True)
        (loss * ranks.world_size).backward()  # gradients become the mean over processes
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.train.gradient_clip)
        self.optimizer.step()
        return loss.detach()

    def _validate(
        self, validation: Validation, progress: Progress, best: Weights | None, closing: bool = False
    ) -> tuple[Progress, Weights | None]:
        config, ndcg = self.config.train, 0.0
        if self.ranks.is_first:
            ndcg = validation.ndcg(self.network, self.device, config.attention_impl, config.precision == "bf16")
        ndcg = self.ranks.first(ndcg)
        row: dict[str, float | bool] = {"step": progress.step, "seconds": round(progress.seconds, 3)}
        self._write(row | {"valid_ndcg@10": ndcg} | ({"closing": True} if closing else {}))
        if ndcg > progress.best_ndcg:
            return replace(progress, best_ndcg=ndcg, best_step=progress.step, worse=0), copy_weights(self.network)
        return replace(progress, worse=progress.worse + 1), best

    def _log(self, progress: Progress, loss: float, rate: float, speed: "Speed") -> None:
        if not torch.isfinite(torch.tensor(loss)):
            raise RunError(f"{self.run}: the loss is {loss} at step {progress.step}. Lower train.learning_rate.")
        self._write(
            {
                "step": progress.step,
                "seconds": round(progress.seconds, 3),
                "loss": loss,
                "learning_rate": rate,
                "tokens_per_second": round(speed.tokens_per_second, 1),
                "waiting_share": round(speed.waiting_share, 4),
            }
        )
        if self.ranks.is_first:
            self.report(Report(progress.step, self.steps, progress.seconds, loss, speed, progress.best_ndcg))

    def _write(self, row: dict[str, float | bool]) -> None:
        if not self.ranks.is_first:
            return
        with (self.run / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _check(config: RunConfig, device: torch.device) -> None:
    check_loss(config.loss, config.model)
    if config.train.precision == "bf16" and device.type != "cuda":
        raise ConfigError(
            f"train.precision: expected float32 on {device.type}, got bf16. Train on CUDA, or --set "
            "train.precision=float32."
        )


@torch.no_grad()
def _start_item_bias(network: ScoringNetwork, counts: torch.Tensor) -> None:
    assert network.item_bias is not None
    share = counts[1:].clamp(min=1).double() / counts.sum().clamp(min=1)
    network.item_bias[1:] = (share.log() + LEVEL).to(network.item_bias)


def _cut_metrics(run: Path, step: int) -> None:
    """Drop what a run that never stopped would not have: rows after the checkpoint, the closing validation."""
    path = run / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    kept = [row for row in rows if row["step"] <= step and not row.get("closing")]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
