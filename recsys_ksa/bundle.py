"""bundle.json: every file of a bundle with its size and SHA-256, so that what arrives is what was sent.

Written by `ksa index --export`; checked where a bundle is fetched, and before it is served.
"""

import hashlib
import json
import os
from pathlib import Path

from pydantic import NonNegativeInt, ValidationError

from recsys_ksa.config import Strict
from recsys_ksa.errors import RunError
from recsys_ksa.run import BUNDLE_PARTS

BUNDLE_FILE = "bundle.json"


class FileRecord(Strict):
    """One file."""

    num_bytes: NonNegativeInt
    sha256: str


class BundleManifest(Strict):
    """What a bundle is made of. `files`: by path within it, with `/`."""

    release_hash: str
    files: dict[str, FileRecord]


def write_manifest(bundle: Path, release_hash: str) -> str:
    """Write bundle.json; return its `manifest_hash`."""
    manifest = BundleManifest(
        release_hash=release_hash, files={name: _record(bundle / name) for name in _names(bundle)}
    )
    text = manifest.model_dump_json(indent=2) + "\n"
    fresh = bundle / f"{BUNDLE_FILE}.new"
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, bundle / BUNDLE_FILE)
    return manifest_hash(bundle)


def manifest_hash(bundle: Path) -> str:
    """Return the SHA-256 of bundle.json, by which a bundle is asked for."""
    return hashlib.sha256((bundle / BUNDLE_FILE).read_bytes()).hexdigest()


def is_bundle_part(name: str) -> bool:
    """Return whether a path within a bundle, with `/`, may be one: a known file, or one in a known folder."""
    top, *below = name.split("/")
    plain = all(word not in ("", ".", "..") for word in below) and "\\" not in name
    return name == BUNDLE_FILE or (top in BUNDLE_PARTS and len(below) <= 1 and plain)


def check_bundle(bundle: Path) -> BundleManifest:
    """Compare a bundle with its manifest: the same files, of the same bytes, and nothing else.

    Raises:
        RunError: they differ; the file is named.
    """
    manifest = _read(bundle / BUNDLE_FILE)
    names = set(_names(bundle))
    if missing := manifest.files.keys() - names:
        raise RunError(f"{bundle}: expected {min(missing)} as {BUNDLE_FILE} says, got no such file. Copy it again.")
    if others := names - manifest.files.keys():
        raise RunError(f"{bundle}: {min(others)}: expected a file that {BUNDLE_FILE} names, got another. Remove it.")
    for name, expected in sorted(manifest.files.items()):
        if (found := _record(bundle / name)) != expected:
            raise RunError(
                f"{bundle / name}: expected {expected.num_bytes} bytes with SHA-256 {expected.sha256[:12]} as "
                f"{BUNDLE_FILE} says, got {found.num_bytes} with {found.sha256[:12]}. Copy it again."
            )
    return manifest


def _read(file: Path) -> BundleManifest:
    try:
        return BundleManifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{file}: expected a bundle's manifest, got: {reason}. Export it with `ksa index`.") from error


def _names(bundle: Path) -> list[str]:
    """Return all files but the manifest itself.

    Raises:
        RunError: something else than a plain file or folder lies there.
    """
    found: list[str] = []
    for folder, folders, files in os.walk(bundle):
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise RunError(f"{path}: expected a plain file or folder in a bundle, got a link or device. Remove it.")
        found += [(Path(folder) / name).relative_to(bundle).as_posix() for name in files]
    return sorted(name for name in found if name not in (BUNDLE_FILE, f"{BUNDLE_FILE}.new"))


def _record(file: Path) -> FileRecord:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return FileRecord(num_bytes=file.stat().st_size, sha256=digest)
