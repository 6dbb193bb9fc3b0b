"""`ksa compact`: the parts of many increments become one a bucket."""

import argparse
from pathlib import Path

from ksa_pipelines.commands.arguments import step_report
from recsys_ksa.cli import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DS", type=Path, help="as `ksa prepare` wrote it")


def _run(args: argparse.Namespace) -> None:
    from ksa_pipelines.compact import compact

    after = compact(args.dataset, step_report())
    print(f"{args.dataset}: version {after.version}, content hash {after.content_hash[:12]} as before")


verb = Verb(
    summary="merge the parts of a data set's increments and drop its earlier versions",
    example="ksa compact data/shop",
    configure=_configure,
    run=_run,
)
