"""Changing a data set: one writer at a time, all of a new version or nothing of it.

Files of a version are never altered. A change writes new ones beside them, then puts a new manifest.json in place:
that rename is the switch. What a killed change left behind is named by no manifest and goes with the next change.

    manifests/00000.json    the manifests of earlier versions, until `ksa compact` or `ksa forget`
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ksa_pipelines.write import WORK, cannot_write, sync_all
from recsys_ksa.data.cache import CACHE
from recsys_ksa.data.manifest import MANIFEST, Manifest, earlier_versions, read_manifest, versioned
from recsys_ksa.data.rows import rows_name
from recsys_ksa.durable import sync
from recsys_ksa.errors import DataError

LOCK = ".lock"
_FOLDERS = ("histories", "vocab", "quarantine", "cache", "manifests")


@dataclass(frozen=True)
class Change:
    """A data set that is being changed."""

    path: Path
    before: Manifest
    """Of the current version."""

    @property
    def version(self) -> int:
        """The version that is being made."""
        return self.before.version + 1

    @property
    def work(self) -> Path:
        """A folder to work in, gone at the end."""
        return self.path / WORK

    def publish(self, after: Manifest, *, keep_earlier: bool) -> None:
        """Make `after` the current version; without `keep_earlier` nothing else of the data set is left.

        All files it names must be written; they are synced first.
        """
        assert after.version == self.version
        sync_all(self.path / name for name in after.files if name not in self.before.files)
        if keep_earlier:
            self._keep_manifest()
        for folder in (self.path, *(self.path / name for name in _FOLDERS)):
            if folder.is_dir():
                sync(folder)
        after.save(self.path)
        sync(self.path)
        if not keep_earlier:
            shutil.rmtree(self.path / "manifests", ignore_errors=True)
        remove_leftovers(self.path)

    def _keep_manifest(self) -> None:
        kept = self.path / "manifests" / f"{self.before.version:05d}.json"
        kept.parent.mkdir(exist_ok=True)
        unfinished = kept.with_suffix(".unfinished")
        shutil.copyfile(self.path / MANIFEST, unfinished)
        sync(unfinished)
        unfinished.replace(kept)


@contextmanager
def changing(dataset: Path) -> Iterator[Change]:
    """Yield the data set to one writer; an error or a kill leaves the current version as it is.

    Raises:
        DataError: it is no data set, another process is changing it, or the disk refuses.
    """
    manifest = read_manifest(dataset)
    with _locked(dataset):
        try:
            remove_leftovers(dataset)
            manifest = read_manifest(dataset)
            yield Change(dataset, manifest)
        except BaseException as error:
            remove_leftovers(dataset)
            if isinstance(error, OSError):
                raise cannot_write(dataset, error) from error
            raise


@contextmanager
def _locked(dataset: Path) -> Iterator[None]:
    try:
        file = (dataset / LOCK).open("w")
    except OSError as error:
        raise cannot_write(dataset, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{dataset}: expected to be alone, another process is changing this data set. Wait for it to end."
            ) from error
        yield


def remove_leftovers(dataset: Path) -> None:
    """Remove every file that no version names, and the loader's copies of earlier versions (they can be rebuilt)."""
    current = read_manifest(dataset)
    cache = versioned(CACHE, current.version)
    named = {cache, cache.removesuffix(".arrow") + ".json", *current.files}
    for version in earlier_versions(dataset):
        manifest = read_manifest(dataset, version)
        named |= {f"manifests/{version:05d}.json", *manifest.files}
    named |= {rows_name(name) for name in named if name.startswith("histories/")}
    shutil.rmtree(dataset / WORK, ignore_errors=True)
    folders = [folder for folder in _FOLDERS if (dataset / folder).is_dir()]
    found = [f"{folder}/{file.name}" for folder in folders for file in os.scandir(dataset / folder) if file.is_file()]
    tables = [*dataset.glob("items*.parquet"), *dataset.glob("users*.parquet"), *dataset.glob(f".{MANIFEST}.*")]
    found += [path.name for path in tables]
    for name in found:
        if name not in named and not _is_being_built(Path(name)):
            (dataset / name).unlink(missing_ok=True)
    if (dataset / "manifests").is_dir() and not os.listdir(dataset / "manifests"):
        (dataset / "manifests").rmdir()


def _is_being_built(path: Path) -> bool:
    """Whether it is a cache that a reader builds now, such as `.histories.arrow.<process>`."""
    process = path.suffix[1:]
    return path.parent.name == "cache" and process.isdigit() and Path("/proc", process).exists()
