"""`ksa view`: caps, bots and k-core of a data set, as a new one."""

import argparse
from pathlib import Path

from ksa_pipelines.commands.arguments import add_resources, resources_of, step_report
from ksa_pipelines.commands.loading import loading
from recsys_ksa.cli import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DS", type=Path, help="as `ksa prepare` wrote it")
    parser.add_argument("--out", metavar="VIEW", required=True, type=Path, help="data set to write; must not exist")
    parser.add_argument("--k-core", type=int, default=0, metavar="N", help="items and users with N events or more")
    parser.add_argument("--max-user-events", type=int, metavar="N", help="only the newest N events of each user")
    parser.add_argument(
        "--max-item-events", type=int, metavar="N", help="only the newest N events of each item; one second goes whole"
    )
    parser.add_argument("--drop-bots", action="store_true", help="leave out users that `ksa inspect` calls bots")
    add_resources(parser)


def _run(args: argparse.Namespace) -> None:
    with loading():
        from ksa_pipelines.bots import BotRule
        from ksa_pipelines.view import Limits, view
        from recsys_ksa.errors import UsageError

    for name, value, least in (
        ("k-core", args.k_core, 0),
        ("max-user-events", args.max_user_events, 1),
        ("max-item-events", args.max_item_events, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"--{name}: expected at least {least}, got {value}.")
    limits = Limits(args.k_core, args.max_user_events, args.max_item_events, BotRule() if args.drop_bots else None)
    counts = view(args.dataset, args.out, limits, step_report(), resources_of(args)).counts
    print(f"{args.out}: {counts.users:,} users, {counts.items:,} items, {counts.events:,} events")


verb = Verb(
    summary="write a smaller data set: k-core, caps, without bots",
    example="ksa view data/shop --out data/shop-5 --k-core 5 --drop-bots",
    configure=_configure,
    run=_run,
)
