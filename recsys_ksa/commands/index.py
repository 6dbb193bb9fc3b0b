"""`ksa index`: write a run's exact item index, and optionally a bundle to ship."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from recsys_ksa.cli import Verb
from recsys_ksa.errors import RunError

if TYPE_CHECKING:
    from recsys_ksa.data.popularity import DayCounts
    from recsys_ksa.run import Run


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--export", metavar="BUNDLE", type=Path, help="also copy the run, without optimiser files")
    parser.add_argument(
        "--popularity-as-of",
        metavar="TIME",
        type=int,
        help='Unix seconds; for runs with model.item_bias = "popularity-7d": items are as popular as on the whole days '
        "(UTC) before TIME; default: the last event counted",
    )
    parser.add_argument(
        "--data",
        metavar="DS",
        type=Path,
        help="count popularity in this prepared data set, items matched by id; default: in the one the run was trained "
        "on, whose daily counts lie in RUN",
    )


def _run(args: argparse.Namespace) -> None:
    from recsys_ksa.bundle import BUNDLE_FILE, write_manifest
    from recsys_ksa.retrieval.index import load_index, write_index
    from recsys_ksa.retrieval.popularity_column import PopularityColumn, popularity_column
    from recsys_ksa.run import BUNDLE_PARTS, INDEX_FOLDER, load_network, open_run

    run = open_run(args.run)
    if args.export is not None and args.export.exists():
        raise RunError(f"{args.export}: expected a path that does not exist yet, got an existing one. Name another.")
    network = load_network(run)
    column = None
    if network.popularity_bias is not None:
        column = popularity_column(network, _counts(run, args.data), args.popularity_as_of)
    elif args.popularity_as_of is not None or args.data is not None:
        raise RunError(
            f'{args.run}: --popularity-as-of, --data: expected a run with model.item_bias = "popularity-7d", got '
            f"{run.config.model.item_bias!r}. Leave them out."
        )
    vectors = network.item_vectors().detach()
    fresh = run.path / f"{INDEX_FOLDER}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    manifest = write_index(fresh, vectors, run.info.release_hash, column)
    index = load_index(fresh, vectors, run.info.release_hash, None if column is None else PopularityColumn.load(fresh))
    shutil.rmtree(run.path / INDEX_FOLDER, ignore_errors=True)
    fresh.rename(run.path / INDEX_FOLDER)
    print(f"{run.path / INDEX_FOLDER}: {run.info.num_items - 1} items, {manifest['dim']} dimensions, {index.kind}")
    if (run.path / BUNDLE_FILE).exists():  # a bundle whose index is new
        write_manifest(run.path, run.info.release_hash)
    if column is not None:
        print(f"items as popular as on the days before {column.as_of} s, column {column.hash[:12]}")
    if args.export is not None:
        args.export.mkdir(parents=True)
        for name in BUNDLE_PARTS:
            part = run.path / name
            if part.is_dir():
                shutil.copytree(part, args.export / name)
            elif part.exists():
                shutil.copy2(part, args.export / name)
        digest = write_manifest(args.export, run.info.release_hash)
        print(f"{args.export}: bundle of release {run.info.release_hash[:12]}, manifest {digest}")


def _counts(run: "Run", data: Path | None) -> "DayCounts":
    """Return the counts of the run's own data set, or of `data` under the run's item numbers."""
    from recsys_ksa.run import load_counts

    if data is None:
        return load_counts(run)
    import numpy as np

    from recsys_ksa.data.dataset import open_dataset
    from recsys_ksa.data.popularity import DayCounts
    from recsys_ksa.schema import UNKNOWN_ITEM

    dataset = open_dataset(data)
    if dataset.manifest.clock != run.info.clock:
        raise RunError(f"{data}: expected the run's clock, {run.info.clock}, got {dataset.manifest.clock}.")
    known = run.items.index_of
    index = [UNKNOWN_ITEM if item is None else known.get(item, UNKNOWN_ITEM) for item in dataset.items.item_id]
    return DayCounts.of_histories(dataset.histories).renumbered(np.array(index, dtype=np.int64))


verb = Verb(
    summary="build a run's exact item index, and a bundle to ship with --export",
    example="ksa index runs/ksa --export bundles/ksa",
    configure=_configure,
    run=_run,
)
