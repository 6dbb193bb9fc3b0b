"""`ksa prepare`: a log becomes a prepared data set. Imports nothing heavy until it runs."""

import argparse
from pathlib import Path

from ksa_pipelines.commands.arguments import add_resources, refuse_missing_tables, resources_of, step_report
from ksa_pipelines.commands.loading import loading
from recsys_ksa.cli import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", metavar="LOG", help="a file, a folder, a pattern in quotes, a table, or an address")
    parser.add_argument("--out", metavar="DS", required=True, type=Path, help="data set to write; must not exist")
    parser.add_argument("--config", metavar="PREPARE.toml", type=Path, help="column mapping, filters, split")
    parser.add_argument("--preset", metavar="NAME", help="mapping of a public log: movielens, amazon, kuairand, ...")
    parser.add_argument(
        "--download", action="store_true", help="fetch the preset's log from its publisher into the folder LOG first"
    )
    parser.add_argument("--accept-terms", action="store_true", help="accept the publisher's terms, which are shown")
    parser.add_argument("--items", metavar="FILE", help="items file: titles and side features")
    parser.add_argument("--users", metavar="FILE", help="table of users: features that questions tell")
    parser.add_argument(
        "--tie", choices=["id", "arrival", "hash"], help="order of equal timestamps; overrides the audit"
    )
    parser.add_argument("--clock", choices=["unix", "relative", "ordinal"], help="what a timestamp is (default: unix)")
    parser.add_argument("--num-buckets", type=int, metavar="N", help="buckets of users, one part each (default: 64)")
    parser.add_argument("--k-core", type=int, metavar="N", help="keep items and users with N events or more")
    add_resources(parser)


def _run(args: argparse.Namespace) -> None:
    with loading():
        from ksa_pipelines.config import resolve_config
        from ksa_pipelines.prepare import prepare

    names = ("tie", "clock", "num_buckets", "k_core")
    said = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = resolve_config(args.preset, args.config, said)
    report = step_report()
    if args.download:
        from ksa_pipelines.download import download_of, fetch

        fetch(download_of(args.preset), Path(args.log), report, accepted=args.accept_terms)
    refuse_missing_tables(args)
    counts = prepare(args.log, args.out, config, args.items, report, resources_of(args), args.users).counts
    print(
        f"{args.out}: {counts.users:,} users, {counts.items:,} items, {counts.events:,} events; histories of "
        f"{counts.shortest_history:,} to {counts.longest_history:,} events, median {counts.median_history:,.0f}"
    )


verb = Verb(
    summary="turn a log of events into a prepared data set",
    example="ksa prepare events.parquet --out data/shop --config configs/prepare/online-retail.toml",
    configure=_configure,
    run=_run,
)
