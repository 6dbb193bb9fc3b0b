"""Folders whose names are on the disk before anything rests on them."""

from pathlib import Path

from recsys_ksa.durable import sync


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, for their owner alone; their names are on the disk then."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)
