"""`ksa synth`: a realistic lifelong log of any size."""

import argparse
from pathlib import Path

from recsys_ksa.cli import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="LOG", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--events", type=int, default=1_000_000, help="rows (default: 1,000,000)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same log")
    parser.add_argument("--items", type=int, default=100_000, help="items that can be met (default: 100,000)")
    parser.add_argument("--days", type=int, default=730, help="span of the log (default: 730)")
    parser.add_argument("--median-length", type=float, default=60.0, help="events of the median user (default: 60)")
    parser.add_argument("--event-types", action="store_true", help="add view, cart and buy")
    parser.add_argument("--event-ids", action="store_true", help="add ids that sort by arrival")


def _run(args: argparse.Namespace) -> None:
    from ksa_pipelines.synth import SynthConfig, synthesize
    from recsys_ksa.errors import UsageError
    from recsys_ksa.progress import progress

    for name in ("events", "items", "days", "median_length"):
        if not getattr(args, name) >= 1:  # nor is NaN
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}.")
    config = SynthConfig(
        events=args.events,
        seed=args.seed,
        items=args.items,
        days=args.days,
        median_length=args.median_length,
        event_types=args.event_types,
        event_ids=args.event_ids,
    )
    parts = sum(1 for _ in progress(synthesize(config, args.out), "parts", unit="part"))
    print(f"{args.out}: {args.events:,} events in {parts} parts")


verb = Verb(
    summary="write a realistic lifelong log, drawn from a seed",
    example="ksa synth --out logs/synth --events 10000000 --seed 1",
    configure=_configure,
    run=_run,
)
