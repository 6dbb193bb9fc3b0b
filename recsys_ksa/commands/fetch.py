"""`ksa fetch`: take a bundle out of an MLflow store. The store is a source of bytes, not of trust.

Files arrive in a quarantine folder beside the place they are for, by names that bundles have and no others. There the
manifest is compared with the one that was asked for, every file with the manifest, and the weights with the release;
only then is the folder put in place, in one rename. What fails leaves nothing.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from recsys_ksa.cli import Verb
from recsys_ksa.errors import RunError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("number", metavar="MLFLOW_RUN", help="as `ksa publish` told it")
    parser.add_argument("--out", metavar="BUNDLE", type=Path, required=True, help="where it is to be; must not exist")
    parser.add_argument(
        "--manifest",
        metavar="SHA256",
        help="of the bundle's manifest, as `ksa publish` told it; without it whoever can write to the store decides "
        "what is fetched",
    )
    parser.add_argument("--tracking", metavar="URI", help="MLflow tracking URI (default: sqlite in ./mlruns)")
    parser.add_argument(
        "--max-bytes", metavar="N", type=int, default=32 * 1024**3, help="refuse larger bundles (default: 32 GiB)"
    )


def _run(args: argparse.Namespace) -> None:
    from recsys_ksa.bundle import manifest_hash
    from recsys_ksa.evaluate.tracking import open_store

    if args.out.exists() or args.out.is_symlink():
        raise RunError(f"{args.out}: expected a path that does not exist yet, got an existing one. Name another.")
    store = open_store(args.tracking)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    quarantine = Path(tempfile.mkdtemp(prefix=".quarantine-", dir=args.out.parent))
    try:
        folder = quarantine / args.out.name
        store.fetch_bundle(args.number, folder, args.max_bytes)
        found = manifest_hash(folder)
        if args.manifest is not None and found != args.manifest.lower():
            raise RunError(
                f"MLflow run {args.number}: expected a bundle with manifest {args.manifest[:12]}, got {found[:12]}. "
                "It is not the one that was published under that name; nothing was kept."
            )
        release = check_fetched(folder)
        os.rename(folder, args.out)
    finally:
        shutil.rmtree(quarantine, ignore_errors=True)
    print(f"{args.out}: bundle of release {release[:12]}, manifest {found}")


def check_fetched(folder: Path) -> str:
    """Check all that can be checked of a bundle before anybody uses it; return its release.

    Raises:
        RunError: a file is missing, altered or unknown, or the weights are not those of the release.
    """
    from recsys_ksa.bundle import check_bundle
    from recsys_ksa.run import load_network, open_run

    manifest = check_bundle(folder)
    run = open_run(folder)
    load_network(run)
    if run.info.release_hash != manifest.release_hash:
        raise RunError(f"{folder}: run.json and the manifest name different releases. Publish the bundle again.")
    return manifest.release_hash


verb = Verb(
    summary="take a bundle out of an MLflow store, checked in quarantine",
    example="ksa fetch 0123456789abcdef0123456789abcdef --manifest SHA256 --out releases/ksa",
    configure=_configure,
    run=_run,
)
