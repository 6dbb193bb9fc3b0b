"""`ksa index`: write a run's exact item index, and optionally a bundle to ship."""

import argparse
import shutil
from pathlib import Path

from recsys_ksa.cli import Verb
from recsys_ksa.errors import RunError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--export", metavar="BUNDLE", type=Path, help="also copy the run, without optimiser files")


def _run(args: argparse.Namespace) -> None:
    from recsys_ksa.retrieval.index import load_index, write_index
    from recsys_ksa.run import BUNDLE_PARTS, INDEX_FOLDER, load_network, open_run

    run = open_run(args.run)
    if args.export is not None and args.export.exists():
        raise RunError(f"{args.export}: expected a path that does not exist yet, got an existing one. Name another.")
    vectors = load_network(run).item_vectors().detach()
    fresh = run.path / f"{INDEX_FOLDER}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    manifest = write_index(fresh, vectors, run.info.release_hash)
    index = load_index(fresh, vectors, run.info.release_hash)
    shutil.rmtree(run.path / INDEX_FOLDER, ignore_errors=True)
    fresh.rename(run.path / INDEX_FOLDER)
    print(f"{run.path / INDEX_FOLDER}: {run.info.num_items - 1} items, {manifest['dim']} dimensions, {index.kind}")
    if args.export is not None:
        args.export.mkdir(parents=True)
        for name in BUNDLE_PARTS:
            part = run.path / name
            if part.is_dir():
                shutil.copytree(part, args.export / name)
            elif part.exists():
                shutil.copy2(part, args.export / name)
        print(f"{args.export}: bundle of release {run.info.release_hash[:12]}")


verb = Verb(
    summary="build a run's exact item index, and a bundle to ship with --export",
    example="ksa index runs/ksa --export bundles/ksa",
    configure=_configure,
    run=_run,
)
