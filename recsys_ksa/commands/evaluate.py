"""`ksa evaluate`: full-ranking figures of a run beside compared runs and baselines."""

import argparse
from pathlib import Path

from recsys_ksa.cli import Verb


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the run, called ksa in the table")
    parser.add_argument("--data", metavar="DS", type=Path, required=True, help="the data set it was trained on")
    parser.add_argument(
        "--compare",
        metavar="RUN",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="runs trained apart, on the same data and split; named by model.attention (full, window)",
    )
    parser.add_argument(
        "--protocol",
        choices=["loo", "loo-classic", "global", "all"],
        help="default: that of the run's training span; of a run with span any: global where the clock and the log "
        "allow it, else loo. all: each that is honest here",
    )
    parser.add_argument(
        "--request-time",
        choices=["target", "drawn", "none", "all"],
        help="what the model is told of the time of asking; default: all that the clock allows",
    )
    parser.add_argument(
        "--max-length",
        metavar="N",
        type=int,
        help="let runs read the newest N events of a history only, cut at a chunk boundary, true positions kept "
        "(figures in the literature often read 200); default: whole histories",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows as a JSON list")
    parser.add_argument(
        "--rankings",
        metavar="FILE.parquet",
        type=Path,
        help="write the first 200 items of every question (loo and target time unless said)",
    )
    parser.add_argument(
        "--tracking",
        metavar="none|URI",
        help="MLflow tracking URI; default: sqlite:///mlruns/mlflow.db under the working directory. none: no MLflow",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="report and plots; default: RUN/evaluation")
    parser.add_argument(
        "--baselines",
        metavar="NAMES",
        help="comma-separated, or none; default: all (item-item needs the package implicit)",
    )
    parser.add_argument(
        "--exclude-seen",
        choices=["true", "false"],
        help="leave what the user had out of the ranking, targets excepted; default: the run's",
    )
    parser.add_argument("--device", default="cpu", help="where networks run, for example cuda; default: cpu")


def run(args: argparse.Namespace) -> None:
    """Evaluate as the arguments say."""
    from recsys_ksa.evaluate.command import evaluate

    evaluate(args)


verb = Verb(
    summary="full-ranking figures of a run beside baselines and compared runs",
    example="ksa evaluate runs/ksa --data data/log --protocol global --json figures.json",
    configure=configure,
    run=run,
)
