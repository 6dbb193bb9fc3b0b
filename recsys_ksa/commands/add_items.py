"""`ksa add-items`: give a run the items that were first met after it was trained."""

import argparse
from pathlib import Path

from recsys_ksa.cli import Verb
from recsys_ksa.errors import RunError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory or bundle")
    parser.add_argument(
        "--data",
        metavar="DS",
        type=Path,
        required=True,
        help="prepared data set that has met the new items, such as the run's own after `ksa append-log`",
    )
    parser.add_argument(
        "--out", metavar="NEW", type=Path, required=True, help="the run with more items; must not exist"
    )


def _run(args: argparse.Namespace) -> None:
    from recsys_ksa.added_items import add_items
    from recsys_ksa.data.dataset import open_dataset
    from recsys_ksa.run import open_run

    if args.out.exists() or args.out.is_symlink():
        raise RunError(f"{args.out}: expected a path that does not exist yet, got an existing one. Name another.")
    run = open_run(args.run)
    count = add_items(run, open_dataset(args.data), args.out)
    print(f"{args.out}: {run.info.num_items - 1:,} items and {count:,} new ones, states of {args.run} stay")


verb = Verb(
    summary="give a run the items that were first met after it was trained; users' states stay",
    example="ksa add-items runs/ksa --data data/mine --out runs/ksa-today",
    configure=_configure,
    run=_run,
)
