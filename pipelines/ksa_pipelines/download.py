"""Getting a public log from its publisher: terms shown, checksum compared, there whole or not at all."""

import hashlib
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import IO

from ksa_pipelines.report import Report
from ksa_pipelines.write import atomic_directory
from recsys_ksa.config_files import Strict, load_config
from recsys_ksa.errors import DataError, UsageError
from recsys_ksa.progress import progress

PIECE = 1 << 20
TIMEOUT = 30
"""Seconds without an answer."""


class Download(Strict):
    """Where a preset's log is."""

    address: str
    """Of a zip archive."""
    md5: str
    """As the publisher gives it."""
    members: tuple[str, ...]
    """Files of the archive that are kept."""
    terms: str
    """The publisher's, in short, and where they are in full."""


class _Downloads(Strict):
    presets: dict[str, Download]


def download_of(preset: str | None) -> Download:
    """Return where a preset's log is.

    Raises:
        UsageError: it has to be fetched by hand.
    """
    with resources.as_file(resources.files("ksa_pipelines") / "downloads.toml") as file:
        known = load_config(_Downloads, file).presets
    if preset not in known:
        raise UsageError(
            f"--download: expected --preset {' or '.join(sorted(known))}, got {preset}. Get the log from its "
            "publisher, under its terms, and give its file."
        )
    return known[preset]


def fetch(download: Download, folder: Path, report: Report, *, accepted: bool) -> None:
    """Put the log's files into `folder`; nothing is fetched where the folder is there already.

    Args:
        download: what to fetch.
        folder: to make.
        report: is told the terms and what was done.
        accepted: the user has accepted the terms.

    Raises:
        UsageError: the terms are not accepted.
        DataError: the publisher cannot be reached, or what came is not what it published.
    """
    if folder.is_dir():
        report(f"{folder} is there: nothing is fetched")
        return
    report(f"terms of {download.address}:\n{download.terms.strip()}")
    if not accepted:
        raise UsageError("--download: expected --accept-terms beside it: the publisher's terms are printed above.")
    with atomic_directory(folder) as unfinished:
        archive = unfinished / "archive.zip"
        found = _receive(download.address, archive)
        if found != download.md5:
            raise DataError(
                f"{download.address}: expected md5 {download.md5}, got {found}: broken on the way, or another edition. "
                "Try again, or fetch it by hand."
            )
        _unpack(archive, download, unfinished)
        archive.unlink()
    report(f"fetched {download.address} (md5 {download.md5}) into {folder}")


def _receive(address: str, target: Path) -> str:
    """Write what is at an address into a file; return its md5."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer, target.open("wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            for piece in progress(_pieces(answer), "download", total=size // PIECE or None, unit="MiB"):
                digest.update(piece)
                file.write(piece)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{address}: expected the publisher to answer, got: {reason}. Without a network, fetch the file elsewhere, "
            "unpack it, and give the log's file without --download."
        ) from error
    return digest.hexdigest()


def _pieces(answer: IO[bytes]) -> Iterator[bytes]:
    while piece := answer.read(PIECE):
        yield piece


def _unpack(archive: Path, download: Download, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            for member in download.members:
                with file.open(member) as source, (folder / os.path.basename(member)).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(
            f"{download.address}: expected a zip with {', '.join(download.members)}, got: {error}."
        ) from error
