"""`ksa report`: evaluations of any runs, side by side, as one HTML page and one Markdown text."""

import argparse
from pathlib import Path

from recsys_ksa.cli import Verb

PAGE, TEXT = "report.html", "report.md"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="runs that `ksa evaluate` has evaluated, or folders that its --out names",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help=f"where {PAGE} and {TEXT} go")
    parser.add_argument("--title", default="Evaluation", help="of the page")
    parser.add_argument(
        "--tracking",
        metavar="none|URI",
        help="MLflow tracking URI; default: sqlite:///mlruns/mlflow.db under the working directory. none: no MLflow",
    )


def run(args: argparse.Namespace) -> None:
    """Read, refuse what cannot be compared, write.

    Raises:
        DataError: a run was not evaluated.
        RunError: the evaluations cannot be compared; with the reason.
    """
    from recsys_ksa.errors import UsageError
    from recsys_ksa.evaluate import page, tracking
    from recsys_ksa.evaluate.comparison import compare, read_evaluations
    from recsys_ksa.evaluate.comparison_plots import draw
    from recsys_ksa.evaluate.plots import read_curves
    from recsys_ksa.run import METRICS_FILE

    by_run = [read_evaluations(path) for path in args.runs]
    evaluations = [recorded for found in by_run for recorded in found]
    comparisons = compare(evaluations)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {args.out}: expected a directory that can be written, got: {error.strerror}."
        ) from error
    store = None if args.tracking == "none" else tracking.open_store(args.tracking)
    curves = {found[0].record.runs[0].name: read_curves(path / METRICS_FILE) for path, found in zip(args.runs, by_run)}
    plots = [draw(comparison, curves) for comparison in comparisons]
    files = [args.out / PAGE, args.out / TEXT]
    text = page.markdown(args.title, comparisons)
    files[0].write_text(page.html(args.title, comparisons, plots), encoding="utf-8")
    files[1].write_text(text, encoding="utf-8")
    print(text)
    print(f"report: {files[0]}, {files[1]}")
    if store is None:
        print("tracking: none, as asked")
    else:
        record = evaluations[0].record
        params = {
            "runs": ", ".join(str(path) for path in args.runs),
            "data_hash": record.data_hash,
            "split_hash": record.split_hash,
        }
        print(f"tracking: {store.record_files(args.title, params, files)}")


verb = Verb(
    summary="evaluations of any runs side by side: one HTML page, one Markdown text",
    example="ksa report runs/ksa runs/full --out reports/attention",
    configure=configure,
    run=run,
)
