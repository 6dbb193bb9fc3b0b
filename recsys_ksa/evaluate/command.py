"""What `ksa evaluate` does: read, refuse what is not honest, evaluate, print, write, track."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.errors import MissingPackageError, ProtocolError, UsageError
from recsys_ksa.evaluate import tracking
from recsys_ksa.evaluate.baselines import NAMES
from recsys_ksa.evaluate.evaluation import (
    Evaluation,
    NamedRun,
    check_max_length,
    check_run,
    evaluate_protocol,
    main_scorer,
)
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import (
    ProtocolName,
    RequestTime,
    ask,
    check_honest,
    check_request_time,
    default_protocol,
    honest_protocols,
    honest_request_times,
)
from recsys_ksa.evaluate.rankings import write_rankings
from recsys_ksa.evaluate.record import write_record
from recsys_ksa.evaluate.report import markdown
from recsys_ksa.evaluate.rows import MAIN, Row, write_rows
from recsys_ksa.run import METRICS_FILE, Run, load_scoring_network, open_run

if TYPE_CHECKING:
    import torch


def evaluate(args: argparse.Namespace) -> list[Row]:
    """Run the command; return all rows.

    Raises:
        ProtocolError, RunError, DataError, MissingPackageError, UsageError: with the reason, before the long work.
    """
    dataset = open_dataset(args.data)
    runs = [open_run(args.run), *(open_run(path) for path in args.compare)]
    for run in runs:
        check_run(run, dataset)
        check_max_length(args.max_length, run)
    protocols = _protocols(args, dataset, runs)
    variants = _variants(args, dataset)
    baseline_names = _baseline_names(args)
    out = args.out or args.run / "evaluation"
    _check_writable(out / "report.md", args.json, args.rankings)
    store = None if args.tracking == "none" else tracking.open_store(args.tracking)
    exclude_seen = runs[0].info.exclude_seen if args.exclude_seen is None else args.exclude_seen == "true"
    device = _device(args.device)
    named = [NamedRun(name, run, load_scoring_network(run, device)) for name, run in zip(_names(runs), runs)]
    ownership = Ownership(dataset.histories)

    rows: list[Row] = []
    for protocol in protocols:
        evaluation = evaluate_protocol(
            dataset,
            protocol,
            named,
            variants,
            ownership,
            exclude_seen=exclude_seen,
            baseline_names=baseline_names,
            max_length=args.max_length,
        )
        rows += evaluation.rows
        _publish(evaluation, dataset, named, out / protocol, store)
    if args.json is not None:
        write_rows(rows, args.json)
        print(f"rows: {args.json}")
    if args.rankings is not None:
        _export_rankings(args, dataset, named[0], protocols[0], ownership, exclude_seen)
    return rows


def _protocols(args: argparse.Namespace, dataset: Dataset, runs: Sequence[Run]) -> list[ProtocolName]:
    """Return the protocols to evaluate, after refusing what is not honest for every run."""
    span = runs[0].info.training_span
    if args.protocol == "all":
        reasons = honest_protocols(dataset, span)
        for protocol, reason in reasons.items():
            if reason is not None:
                print(f"left out {protocol}: {reason}")
        chosen: list[ProtocolName] = [protocol for protocol, reason in reasons.items() if reason is None]
        if not chosen:
            raise ProtocolError(f"{args.run}: no protocol is honest for this run and data. {reasons['loo']}")
    else:
        chosen = [cast(ProtocolName, args.protocol or default_protocol(dataset, span))]
    for protocol in chosen:
        for run in runs:
            check_honest(dataset, protocol, run.info.training_span)
        ask(dataset.histories, protocol)
    return chosen


def _variants(args: argparse.Namespace, dataset: Dataset) -> tuple[RequestTime, ...]:
    if args.request_time in (None, "all"):
        return honest_request_times(dataset.manifest)
    check_request_time(args.request_time, dataset.manifest)
    return (args.request_time,)


def _baseline_names(args: argparse.Namespace) -> tuple[str, ...]:
    if args.baselines is None:
        return NAMES
    names = () if args.baselines == "none" else tuple(args.baselines.split(","))
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--baselines: expected names of {', '.join(NAMES)}, or none, got {name!r}.")
    return names


def _names(runs: Sequence[Run]) -> list[str]:
    """Return `ksa` for the first run; a compared one is called by its architecture or attention, else by its name."""
    names = [MAIN]
    for run in runs[1:]:
        model = run.config.model
        kind = model.attention if model.architecture == "ksa" else model.architecture
        for name in (kind, run.info.name, run.path.name, f"{run.path.name}-{len(names)}"):
            if name not in (*names, "summary"):
                names.append(name)
                break
    return names


def _check_writable(*files: Path | None) -> None:
    """Refuse a place that cannot be written before the long work rather than after it.

    Raises:
        UsageError: with the reason.
    """
    for file in files:
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            existed = file.exists()
            file.open("ab").close()
            if not existed:
                file.unlink()
        except OSError as error:
            raise UsageError(f"{file}: expected a file that can be written, got: {error.strerror}.") from error


def _device(name: str) -> "torch.device":
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: expected a device that torch can use, got {name!r}: {error}") from error
    return device


def _publish(
    evaluation: Evaluation, dataset: Dataset, runs: Sequence[NamedRun], out: Path, store: "tracking.Store | None"
) -> None:
    """Print and write the report, draw the plots, and record all of it in one MLflow run."""
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(evaluation, dataset, runs)
    print(text)
    report = out / "report.md"
    report.write_text(text, encoding="utf-8")
    record = write_record(evaluation, dataset, runs, out)
    print(f"report: {report}")
    curves = runs[0].run.path / METRICS_FILE
    plots: list[Path] = []
    try:
        from recsys_ksa.evaluate.plots import draw

        plots = draw(evaluation, dataset, runs[0], curves, out)
        print(f"plots: {', '.join(str(plot) for plot in plots)}")
    except MissingPackageError as error:
        # Where tracking was switched off, a machine without matplotlib still gives its figures.
        if store is not None:
            raise
        print(f"plots: none. {error}")
    if store is None:
        print("tracking: none, as asked")
    else:
        place = store.record(evaluation, dataset, runs, curves, [report, *record, *plots])
        print(f"tracking: {place}")


def _export_rankings(
    args: argparse.Namespace,
    dataset: Dataset,
    main: NamedRun,
    evaluated: ProtocolName,
    ownership: Ownership,
    exclude_seen: bool,
) -> None:
    """Write the rankings of `ksa` for the protocol and request time asked for: loo and target unless said."""
    protocol = cast(ProtocolName, args.protocol) if args.protocol not in (None, "all") else evaluated
    if args.protocol in (None, "all") and honest_protocols(dataset, main.run.info.training_span)["loo"] is None:
        protocol = "loo"
    variant = args.request_time
    if variant in (None, "all"):
        variant = honest_request_times(dataset.manifest)[0]
    questions = ask(dataset.histories, protocol)
    scorer = main_scorer(dataset, main, questions, ownership, variant, args.max_length)
    metadata = {
        "model": MAIN,
        "run": main.run.info.name,
        "release_hash": main.run.info.release_hash,
        "protocol": protocol,
        "request_time": variant,
        "exclude_seen": str(exclude_seen).lower(),
        "max_length": "all" if args.max_length is None else str(args.max_length),
        "data_hash": dataset.manifest.content_hash,
        "split_hash": dataset.manifest.split_hash,
    }
    count = write_rankings(
        args.rankings,
        scorer,
        questions,
        dataset,
        ownership,
        exclude_seen=exclude_seen,
        metadata=metadata,
        device=main.network.start.device,
    )
    print(f"rankings: {args.rankings}: {count:,} rows, protocol {protocol}, request time {variant}")
