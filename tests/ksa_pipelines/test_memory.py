"""`--memory` is kept by whole processes, on a log of one file and one row group that would not fit into it."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from recsys_ksa.cli import main

MEASURED = """
import resource, subprocess, sys
ksa = "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"
code = subprocess.call([sys.executable, "-c", ksa, *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""A small process between this one and the command: a child is born with its parent's peak."""


def peak_mib(*arguments: str) -> float:
    """Run `ksa`, and return the most memory that a process of it held."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) / 2**10


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_prepare_and_append_stay_within_their_memory(tmp_path: Path, suffix: str) -> None:
    assert main(["synth", "--out", str(tmp_path / "parts"), "--events", "10000000", "--median-length", "500"]) == 0
    events = pl.read_parquet(tmp_path / "parts" / "*.parquet").sort("timestamp")
    for name, part in (("log", events[:-100_000]), ("more", events[-100_000:])):
        if suffix == "csv":
            part.write_csv(tmp_path / f"{name}.csv")
        else:
            part.write_parquet(tmp_path / f"{name}.parquet", row_group_size=part.height)
    log, more, dataset = (str(tmp_path / name) for name in (f"log.{suffix}", f"more.{suffix}", "ds"))
    assert peak_mib("prepare", log, "--out", dataset, "--memory", "800MiB") < 800
    assert peak_mib("append-log", dataset, more, "--memory", "800MiB") < 800
