"""`ksa forget`: users leave a data set for good."""

import argparse
from pathlib import Path

from ksa_pipelines.commands.arguments import step_report
from recsys_ksa.cli import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DS", type=Path, help="as `ksa prepare` wrote it")
    parser.add_argument("users", metavar="USER_ID", nargs="+", help="whom to remove, and to refuse in later logs")


def _run(args: argparse.Namespace) -> None:
    from ksa_pipelines.forget import forget
    from recsys_ksa.errors import UsageError

    if "" in args.users:
        raise UsageError("USER_ID: expected an id, got an empty one.")
    after = forget(args.dataset, args.users, step_report())
    print(
        f"{args.dataset}: version {after.version}, {after.counts.users:,} users. Runs and bundles trained before, and "
        "source logs, are not part of the data set: see to them."
    )


verb = Verb(
    summary="remove users from a data set, its earlier versions and later logs",
    example="ksa forget data/shop anna",
    configure=_configure,
    run=_run,
)
