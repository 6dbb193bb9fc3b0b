"""Arguments and steps that several verbs share."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ksa_pipelines.ingest import Resources
    from ksa_pipelines.report import Report


def add_resources(parser: argparse.ArgumentParser) -> None:
    """Add `--memory`, `--engine` and `--ray-address`."""
    parser.add_argument("--memory", default="4GiB", help="memory that all processes together may take (default: 4GiB)")
    parser.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="where files and buckets are worked on"
    )
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT", help="of a running Ray cluster; without it Ray starts on this machine"
    )


def resources_of(args: argparse.Namespace) -> Resources:
    """Return what `add_resources` was told.

    Raises:
        UsageError: the memory is no size, or an address is given without Ray.
        MissingPackageError: Ray is asked for and not installed.
    """
    from ksa_pipelines.engine import LocalEngine
    from ksa_pipelines.ingest import Resources
    from ksa_pipelines.memory import Memory
    from recsys_ksa.errors import UsageError

    memory = Memory.parse(args.memory)
    if args.engine == "ray":
        from ksa_pipelines.ray_engine import RayEngine

        engine = RayEngine(args.ray_address)
    elif args.ray_address:
        raise UsageError("--ray-address: expected --engine ray beside it, got the local engine.")
    else:
        engine = LocalEngine()
    if sys.stderr.isatty():
        from ksa_pipelines.watched_engine import WatchedEngine

        engine = WatchedEngine(engine)
    return Resources(engine, memory)


def refuse_missing_tables(args: argparse.Namespace) -> None:
    """Refuse a table of items or users that is not there: it is read after the log, which can take long.

    Raises:
        DataError: no file is found.
    """
    from ksa_pipelines.sources import find_files

    for table in (args.items, args.users):
        if table is not None:
            find_files(table)


def step_report() -> Report:
    """Return a report that prints each step with the seconds since the start."""
    began = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {line}", file=sys.stderr)

    return report
