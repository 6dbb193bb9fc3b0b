"""One evaluation from end to end: a protocol, runs and baselines -> rows and the facts of the report."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.errors import RunError, UsageError
from recsys_ksa.evaluate.baselines import baselines
from recsys_ksa.evaluate.ksa_scorer import AttentionImpl, RunScorer, run_scorers, window_events
from recsys_ksa.evaluate.lists import COVERAGE, ListMetrics
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import (
    ProtocolName,
    Questions,
    RequestTime,
    ask,
    check_honest,
    check_request_time,
    usefulness,
)
from recsys_ksa.evaluate.ranking import Ranks, Scorer, rank_targets
from recsys_ksa.evaluate.rows import MAIN, Row, make_rows
from recsys_ksa.evaluate.slices import Column, columns, slices
from recsys_ksa.evaluate.stored_summaries import Memory, has_summaries
from recsys_ksa.run import check_features

if TYPE_CHECKING:
    from recsys_ksa.config import ModelConfig
    from recsys_ksa.data.dataset import Dataset
    from recsys_ksa.model.scoring import ScoringNetwork
    from recsys_ksa.run import Run

log = logging.getLogger(__name__)
TRUNCATED = "truncated"
REPLACED: tuple[Memory, ...] = ("zeroed", "shuffled")
"""Summaries that the run is shown besides its own."""


@dataclass(frozen=True)
class NamedRun:
    """A run, its network, and what its rows are called."""

    name: str
    run: "Run"
    network: "ScoringNetwork"


@dataclass(frozen=True)
class Evaluation:
    """What one protocol gave."""

    protocol: ProtocolName
    variants: tuple[RequestTime, ...]
    exclude_seen: bool
    max_length: int | None
    """Newest events of a history that runs read; None: all."""
    rows: list[Row]
    notes: dict[str, str]
    """What was chosen or left out, by baseline."""
    num_users: int
    num_questions: int
    num_targets: int
    repeat_share: float
    """Share of the targets that the user had before."""
    users: NDArray[np.int64]
    """[U] rows of the users asked, ascending."""
    columns: list[Column]
    """What each column of `values` holds, C of them."""
    values: NDArray[np.float64]
    """[U, C] each user's mean; NaN where there is none."""


def check_run(run: "Run", dataset: "Dataset") -> None:
    """Refuse a run of other data or another split.

    Raises:
        RunError: with both hashes.
    """
    for what, found, expected in (
        ("data", run.info.data_hash, dataset.manifest.content_hash),
        ("split", run.info.split_hash, dataset.manifest.split_hash),
    ):
        if found != expected:
            raise RunError(
                f"{run.path}: expected a run with the {what} hash of {dataset.path} ({expected[:12]}), got "
                f"{found[:12]}: figures of different {what} cannot be compared. Train it on this data set."
            )
    if run.items.item_id != dataset.items.item_id:
        raise RunError(
            f"{run.path}: expected the {dataset.num_items - 1} items of {dataset.path}, in their order, got "
            f"{run.info.num_items - 1} others. Train it on this data set."
        )
    check_features(run.path, run.config, run.info, dataset.vocab, f"{dataset.path} and this version")


def check_max_length(max_length: int | None, run: "Run") -> None:
    """Refuse to read less of a history than a chunk.

    Raises:
        UsageError: with the chunk size.
    """
    chunk_size = run.config.model.chunk_size
    if max_length is not None and max_length < chunk_size:
        raise UsageError(
            f"--max-length: expected at least {run.path}'s chunk_size {chunk_size}, got {max_length}: "
            "histories are cut at chunk boundaries."
        )


def why_not_replaced(config: "ModelConfig", dataset: "Dataset", max_length: int | None) -> str | None:
    """Return why stored summaries cannot be zeroed and shuffled; None where they can."""
    if not has_summaries(config):
        return "the run keeps no summaries"
    if max_length is not None:
        return "only the newest events are read"
    return None if dataset.histories.num_users > 1 else "there is one user only"


def evaluate_protocol(
    dataset: "Dataset",
    protocol: ProtocolName,
    runs: Sequence[NamedRun],
    variants: Sequence[RequestTime],
    ownership: Ownership,
    *,
    exclude_seen: bool,
    baseline_names: Sequence[str],
    max_length: int | None = None,
    attention_impl: AttentionImpl = "auto",
) -> Evaluation:
    """Evaluate the runs (the first is `ksa`), its truncated form, and the baselines under one protocol.

    `max_length` shows runs the newest events of a history only, at most so many (see `run_scorers`). Baselines, slices
    and the seen filter know whole histories.

    Raises:
        UsageError: `max_length` is shorter than a chunk.
        ProtocolError: the data or a run's training span does not allow the protocol or a request time.
        RunError: a run is of other data.
    """
    for named in runs:
        check_run(named.run, dataset)
        check_honest(dataset, protocol, named.run.info.training_span)
        check_max_length(max_length, named.run)
    for variant in variants:
        check_request_time(variant, dataset.manifest)
    questions = ask(dataset.histories, protocol)
    num_items = dataset.num_items - 1
    scorers: list[Scorer] = []
    main = runs[0].network
    window = window_events(main.config)
    shown = [(named.name, named.network, max_length) for named in runs]
    if main.config.architecture == "ksa":
        shown.append((TRUNCATED, main, window if max_length is None else min(window, max_length)))
    for name, network, length in shown:
        scorers += run_scorers(
            name,
            network,
            dataset,
            questions,
            ownership,
            variants,
            max_length=length,
            attention_impl=attention_impl,
        )
    notes = {}
    for memory in REPLACED:
        reason = why_not_replaced(main.config, dataset, max_length)
        if reason is not None:
            notes[f"{MAIN}-{memory}"] = f"left out: {reason}"
            continue
        scorers += run_scorers(
            f"{MAIN}-{memory}",
            main,
            dataset,
            questions,
            ownership,
            [usefulness(variants)],
            memory=memory,
            attention_impl=attention_impl,
        )
    simple, chosen = baselines(dataset, protocol, ownership, exclude_seen=exclude_seen, names=baseline_names)
    scorers.extend(simple)
    notes |= chosen
    ranks, distance = rank_targets(
        scorers, questions, ownership, num_items, exclude_seen=exclude_seen, device=main.start.device
    )
    ranked: list[tuple[str, RequestTime | None, Ranks]] = [
        (scorer.name, scorer.request_time, found) for scorer, found in zip(scorers, ranks)
    ]
    parts = slices(questions, distance, main.config, exclude_seen=exclude_seen)
    lists = ListMetrics(dataset.histories, num_items, protocol)
    names, values = columns(questions, ranked, parts, lists)
    rows = make_rows(protocol, names, values)
    for model, request_time, found in ranked:
        share = lists.coverage(found.top)
        rows.append(Row(model, protocol, request_time, "all", COVERAGE, share, share, share, len(values)))
    return Evaluation(
        protocol=protocol,
        variants=tuple(variants),
        exclude_seen=exclude_seen,
        max_length=max_length,
        rows=rows,
        notes=notes,
        num_users=len(values),
        num_questions=len(questions),
        num_targets=len(questions.target_item),
        repeat_share=float((distance > 0).mean()),
        users=np.unique(questions.user),
        columns=names,
        values=values,
    )


def main_scorer(
    dataset: "Dataset",
    run: NamedRun,
    questions: Questions,
    ownership: Ownership,
    variant: RequestTime,
    max_length: int | None = None,
) -> RunScorer:
    """Return the scorer whose rankings are exported."""
    return run_scorers(MAIN, run.network, dataset, questions, ownership, [variant], max_length=max_length)[0]
