"""kill -9 at random instants of a chain of changes: the old version or the new one stands, never a mix."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.data.manifest import earlier_versions
from recsys_ksa.data.rows import rows_name
from recsys_ksa.testing import lifelong_log, prepared_dataset

KILLS = int(os.environ.get("KSA_KILLS", "10"))
CHAIN = """
import sys
from pathlib import Path
from ksa_pipelines.append import append_log
from ksa_pipelines.compact import compact
from ksa_pipelines.forget import forget
from ksa_pipelines.catalogue import read_catalogue
folder = Path(sys.argv[1])
def say(line): pass
print("ready", flush=True)
append_log(folder / "ds", str(folder / "b.parquet"), say)
append_log(folder / "ds", str(folder / "c.parquet"), say)
compact(folder / "ds", say)
forget(folder / "ds", ["u1"], say)
append_log(folder / "ds", str(folder / "d.parquet"), say)
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A prepared data set and three logs to append."""
    folder = tmp_path_factory.mktemp("start")
    log = pl.DataFrame(lifelong_log(7, 40, 60, median_length=40, event_types=True)).sort("timestamp")
    step = log.height // 4
    prepared_dataset(folder, log.head(step).to_arrow(), arguments=["--num-buckets", "4"])
    for number, name in enumerate("bcd", 1):
        log.slice(number * step, step).write_parquet(folder / f"{name}.parquet")
    return folder


def run_chain(folder: Path, kill_after: float | None) -> tuple[float, bool]:
    """Run the chain, kill it after some seconds; return how long it ran and whether it ended by itself."""
    process = subprocess.Popen([sys.executable, "-c", CHAIN, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    ended = process.stdout.read() == "done\n"
    process.stdout.close()
    return time.monotonic() - began, ended


def read_everything(path: Path) -> Dataset:
    """Open the data set by its cache, and again from its parts."""
    dataset = open_dataset(path)
    shutil.rmtree(path / "cache")
    assert open_dataset(path).histories.item_index.tolist() == dataset.histories.item_index.tolist()
    return dataset


@pytest.fixture(scope="module")
def expected(start, tmp_path_factory) -> tuple[float, dict[int, str]]:
    """Seconds of the whole chain, and the content hash of each version."""
    folder = shutil.copytree(start, tmp_path_factory.mktemp("expected") / "data")
    seconds, ended = run_chain(folder, None)
    assert ended
    last = open_dataset(folder / "ds").manifest
    hashes = {0: open_dataset(start / "ds").manifest.content_hash, 5: last.content_hash}
    # The versions before a compaction are gone with it: make them again, one at a time.
    from ksa_pipelines.append import append_log
    from ksa_pipelines.compact import compact
    from ksa_pipelines.forget import forget

    folder = shutil.copytree(start, tmp_path_factory.mktemp("steps") / "data")
    steps = [
        lambda: append_log(folder / "ds", str(folder / "b.parquet"), lambda line: None),
        lambda: append_log(folder / "ds", str(folder / "c.parquet"), lambda line: None),
        lambda: compact(folder / "ds", lambda line: None),
        lambda: forget(folder / "ds", ["u1"], lambda line: None),
    ]
    return seconds, hashes | {number: step().content_hash for number, step in enumerate(steps, 1)}


def test_a_kill_at_any_instant_leaves_a_whole_version(start, expected, tmp_path, rng):
    seconds, hashes = expected
    met, number = set(), 0
    while number < KILLS or (len(met) < 2 and number < 20 * KILLS):
        folder = shutil.copytree(start, tmp_path / f"kill-{number}")
        took, ended = run_chain(folder, float(rng.uniform(0, 1.1 * seconds)))
        seconds = took if ended else 1.05 * seconds  # beside other work the chain takes now more time, now less
        dataset = read_everything(folder / "ds")
        version = dataset.manifest.version
        met.add(version)
        assert dataset.manifest.content_hash == hashes[version]
        for earlier in earlier_versions(folder / "ds"):
            assert open_dataset(folder / "ds", earlier).manifest.content_hash == hashes[earlier]
        if number % 5 == 0:
            check_going_on(folder / "ds")
        shutil.rmtree(folder)
        number += 1
    assert len(met) > 1


def check_going_on(path: Path) -> None:
    """The next change works, and nothing of the killed one is left after it."""
    from ksa_pipelines.compact import compact

    before = open_dataset(path).manifest
    after = compact(path, lambda line: None)
    assert after.content_hash == before.content_hash
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    cache = {name for name in found if name.startswith("cache/")}
    assert found == {*after.files, "manifest.json", ".lock", *cache}
    assert cache == {rows_name(name) for name in after.files if name.startswith("histories/")}
