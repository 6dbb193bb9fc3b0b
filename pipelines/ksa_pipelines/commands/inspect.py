"""`ksa inspect`: what a data set looks like, as one HTML file."""

import argparse
from pathlib import Path

from recsys_ksa.cli import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DS", type=Path, help="as `ksa prepare` wrote it")
    parser.add_argument("--out", metavar="FILE.html", type=Path, help="default: DS-report.html beside DS")


def _run(args: argparse.Namespace) -> None:
    from ksa_pipelines.html_report import html_report
    from ksa_pipelines.inspection import inspect
    from recsys_ksa.data.dataset import open_dataset
    from recsys_ksa.errors import DataError

    dataset = open_dataset(args.dataset)
    found = inspect(dataset)
    target = args.out or args.dataset.absolute().with_name(f"{args.dataset.absolute().name}-report.html")
    try:
        target.write_text(html_report(dataset, found), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{target}: expected to write the report, got: {error.strerror}. Say --out FILE.html."
        ) from error
    for warning in found.warnings:
        print(f"note: {warning}")
    print(f"{target}: {dataset.manifest.counts.events:,} events looked at")


verb = Verb(
    summary="write an HTML report on a data set: lengths, times, repeats, sessions, split, leaks",
    example="ksa inspect data/shop --out shop.html",
    configure=_configure,
    run=_run,
)
