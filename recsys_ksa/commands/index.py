"""`ksa index`: write a run's item index, and optionally a bundle to ship."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from recsys_ksa.cli import Verb
from recsys_ksa.errors import RecsysKsaError, RunError, UsageError

if TYPE_CHECKING:
    from recsys_ksa.data.popularity import DayCounts
    from recsys_ksa.run import Run


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument(
        "--kind",
        choices=["exact", "ivf"],
        default="exact",
        help="ivf: also make the lists of an approximate index, for large catalogues (`ksa serve --index ivf`), which "
        "must reach recall@100 of 0.98 against exact search (default: %(default)s)",
    )
    parser.add_argument(
        "--probes", metavar="N", type=int, help="of --kind ivf: lists that a search looks into (default: 32)"
    )
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
    from recsys_ksa.retrieval.index import FaissIndex, read_vectors, write_index
    from recsys_ksa.retrieval.ivf import PROBES, load_ivf, write_ivf
    from recsys_ksa.retrieval.popularity_column import PopularityColumn, popularity_column
    from recsys_ksa.run import BUNDLE_PARTS, INDEX_FOLDER, load_network, open_run

    run = open_run(args.run)
    if args.export is not None and args.export.exists():
        raise RunError(f"{args.export}: expected a path that does not exist yet, got an existing one. Name another.")
    if args.probes is not None and (args.kind != "ivf" or args.probes < 1):
        raise UsageError(f"ksa index: --probes {args.probes}: expected 1 or more, and --kind ivf. Change it.")
    network = load_network(run)
    column = None
    if network.popularity_bias is not None:
        column = popularity_column(network, _counts(run, args.data), args.popularity_as_of)
    elif args.popularity_as_of is not None or args.data is not None:
        raise RunError(
            f'{args.run}: --popularity-as-of, --data: expected a run with model.item_bias = "popularity-7d", got '
            f"{run.config.model.item_bias!r}. Leave them out."
        )
    vectors, release = network.item_vectors().detach(), run.info.release_hash
    fresh = run.path / f"{INDEX_FOLDER}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        write_index(fresh, vectors, release, column)
        column = None if column is None else PopularityColumn.load(fresh)
        stored = read_vectors(fresh, vectors, release, column)
        if args.kind == "ivf":
            print("making lists of items and holding them against exact search", flush=True)
            record = write_ivf(fresh, network, stored, args.probes or PROBES)
            index = load_ivf(fresh, network, vectors, release, column)
            found = f"{index.kind}, recall@100 {record.recall:.4f} on {record.num_questions} questions"
        else:
            found = FaissIndex(stored.vectors, stored.version).kind
    except RecsysKsaError:
        shutil.rmtree(fresh)
        raise
    shutil.rmtree(run.path / INDEX_FOLDER, ignore_errors=True)
    fresh.rename(run.path / INDEX_FOLDER)
    print(f"{run.path / INDEX_FOLDER}: {run.info.num_items - 1} items, {vectors.shape[1]} dimensions, {found}")
    if (run.path / BUNDLE_FILE).exists():  # a bundle whose index is new
        write_manifest(run.path, release)
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
        digest = write_manifest(args.export, release)
        print(f"{args.export}: bundle of release {release[:12]}, manifest {digest}")


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
    summary="build a run's item index, and a bundle to ship with --export",
    example="ksa index runs/ksa --export bundles/ksa",
    configure=_configure,
    run=_run,
)
