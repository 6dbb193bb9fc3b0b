"""`ksa append-log`: tomorrow's log on top of a data set."""

import argparse
from pathlib import Path

from ksa_pipelines.commands.arguments import add_resources, refuse_missing_tables, resources_of, step_report
from ksa_pipelines.commands.loading import loading
from recsys_ksa.cli import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DS", type=Path, help="as `ksa prepare` wrote it")
    parser.add_argument("log", metavar="NEW_LOG", help="a file, a folder, a pattern in quotes, or an address")
    parser.add_argument("--items", metavar="FILE", help="items file that describes the new items")
    parser.add_argument("--users", metavar="FILE", help="table of users that describes the new users")
    parser.add_argument("--config", metavar="PREPARE.toml", type=Path, help="column names, where they are others")
    add_resources(parser)


def _run(args: argparse.Namespace) -> None:
    with loading():
        from ksa_pipelines.append import append_log
        from ksa_pipelines.config import PrepareConfig
        from recsys_ksa.config_files import load_config

    mapping = load_config(PrepareConfig, args.config) if args.config else None
    refuse_missing_tables(args)
    after = append_log(
        args.dataset,
        args.log,
        step_report(),
        items=args.items,
        users=args.users,
        mapping=mapping,
        resources=resources_of(args),
    )
    counts = after.counts
    print(
        f"{args.dataset}: version {after.version}, {counts.users:,} users, {counts.items:,} items, "
        f"{counts.events:,} events"
    )


verb = Verb(
    summary="append a log to a prepared data set, at the cost of what it touches",
    example="ksa append-log data/shop events-2024-06-02.parquet",
    configure=_configure,
    run=_run,
)
