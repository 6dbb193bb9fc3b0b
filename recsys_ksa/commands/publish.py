"""`ksa publish`: record a bundle in an MLflow store, from where `ksa fetch` takes it."""

import argparse
from pathlib import Path

from recsys_ksa.cli import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="what `ksa index --export` wrote")
    parser.add_argument("--tracking", metavar="URI", help="MLflow tracking URI (default: sqlite in ./mlruns)")


def _run(args: argparse.Namespace) -> None:
    from recsys_ksa.bundle import check_bundle, manifest_hash
    from recsys_ksa.evaluate.tracking import open_store

    manifest = check_bundle(args.bundle)
    digest = manifest_hash(args.bundle)
    number = open_store(args.tracking).record_bundle(args.bundle, manifest, digest)
    print(f"MLflow run {number}: bundle of release {manifest.release_hash[:12]}, manifest {digest}")
    print(f"fetch it with: ksa fetch {number} --manifest {digest} --out RELEASES/{args.bundle.name}")


verb = Verb(
    summary="record a bundle in an MLflow store, for `ksa fetch`",
    example="ksa publish bundles/ksa",
    configure=_configure,
    run=_run,
)
