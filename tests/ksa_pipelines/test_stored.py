"""What increments read and write: rows of the users they touch, each compared with its digest, and nothing else."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from ksa_pipelines.append import append_log
from ksa_pipelines.bucket import neighbours
from recsys_ksa.data.cache import CACHE, read_parts
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.data.hashes import content_hash, row_digests
from recsys_ksa.data.manifest import read_manifest
from recsys_ksa.data.parts import count_before
from recsys_ksa.errors import DataError

LOG = {"user_id": ["a", "a", "b", "b"], "item_id": ["x", "y", "x", "z"], "timestamp": [10, 30, 20, 40]}


def said(line: str) -> None:
    """Takes a step's line and drops it."""


@pytest.fixture
def path(prepared) -> Path:
    """A data set of one bucket."""
    return prepared(LOG, num_buckets=1).path


def append(path: Path, user: str, timestamp: int) -> None:
    log = path.parent / f"log-{timestamp}.parquet"
    pl.DataFrame({"user_id": [user], "item_id": ["w"], "timestamp": [timestamp]}).write_parquet(log)
    append_log(path, str(log), said)


def damage(path: Path, value: int) -> None:
    """Alter a timestamp in the rows of a bucket."""
    raw = path.read_bytes()
    old = value.to_bytes(8, "little")
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, (value + 1).to_bytes(8, "little")))


def test_an_append_writes_rows_of_touched_users_and_no_copy_of_all(path):
    append(path, "b", 50)
    files = sorted(file.name for file in (path / "cache").iterdir())
    assert files == ["rows-00000-00000.arrow", "rows-00001-00000.arrow"]
    rows = pa.ipc.open_file(path / "cache" / "rows-00001-00000.arrow").read_all()
    assert rows.column("user_id").to_pylist() == ["b"]


def test_the_copy_is_built_by_whoever_opens_the_version_first(path):
    append(path, "b", 50)
    built = path / "cache" / "histories-00001.arrow"
    assert not built.exists()
    first = open_dataset(path).histories
    written = built.stat().st_mtime_ns
    assert first.timestamp.tolist() == [10, 30, 20, 40, 50]
    assert open_dataset(path).histories.timestamp.tolist() == first.timestamp.tolist()
    assert built.stat().st_mtime_ns == written


def test_the_content_hash_after_appends_is_that_of_all_rows(path):
    for number, user in enumerate("bcab"):
        append(path, user, 50 + number)
        manifest = read_manifest(path)
        table = read_parts(path, manifest)
        assert content_hash(table.schema.names, row_digests(table)) == manifest.content_hash


def test_a_damaged_row_is_refused_where_it_is_touched(path):
    damage(path / "cache" / "rows-00000-00000.arrow", 30)  # of a
    append(path, "b", 50)
    with pytest.raises(DataError, match=r"rows-00000-00000\.arrow: .* was altered\. Delete"):
        append(path, "a", 60)
    assert read_manifest(path).version == 1
    with pytest.raises(DataError, match="was altered"):
        open_dataset(path)


def test_a_damaged_digest_is_refused(path):
    file = path / "cache" / "rows-00000-00000.arrow"
    digest = pa.ipc.open_file(file).read_all().column("digest")[0].as_py()
    file.write_bytes(file.read_bytes().replace(digest, bytes(32)))
    with pytest.raises(DataError, match="expected content_hash"):
        append(path, "b", 50)


@pytest.mark.parametrize("left", [0, 100])
def test_a_truncated_file_is_refused(path, left):
    file = path / "cache" / "rows-00000-00000.arrow"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(DataError, match="was altered"):
        append(path, "b", 50)


def test_what_is_missing_is_made_again_from_the_parts(path):
    append(path, "b", 50)
    before = {file: pa.ipc.open_file(file).read_all() for file in (path / "cache").iterdir()}
    for file in before:
        file.unlink()
    append(path, "c", 60)
    assert all(pa.ipc.open_file(file).read_all().equals(rows) for file, rows in before.items())
    assert open_dataset(path).histories.timestamp.tolist() == [10, 30, 20, 40, 50, 60]


def test_an_altered_part_is_refused_where_its_rows_are_missing(path):
    (path / "cache" / "rows-00000-00000.arrow").unlink()
    part = path / "histories" / "part-00000-00000.parquet"
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(DataError, match="the file was altered"):
        append(path, "b", 50)


def test_an_earlier_versions_copy_goes_and_comes_back(path):
    open_dataset(path)
    append(path, "b", 50)
    assert not (path / CACHE).exists()
    assert open_dataset(path, version=0).histories.timestamp.tolist() == [10, 30, 20, 40]


def test_events_before_a_cut_are_counted_by_halving(rng):
    lengths = rng.integers(0, 9, size=50)
    times = [np.sort(rng.integers(0, 20, size=length)) for length in lengths]
    offsets = np.append(0, np.cumsum(lengths))
    for cut in (-1, 0, 7, 19, 20, 99):
        before = np.array([(each < cut).sum() for each in times])
        for guess in (None, before, before + rng.integers(-2, 3, size=50), rng.integers(-9, 20, size=50)):
            assert count_before(np.concatenate(times), offsets, cut, guess).tolist() == before.tolist()


def test_small_neighbours_are_put_together(rng):
    num_events, first = rng.integers(0, 9, size=50), int(rng.integers(0, 9))
    found = [*neighbours(num_events, 10, first)]
    assert [bucket for buckets in found for bucket in buckets] == [*range(first, first + 50)]
    held = [num_events[buckets.start - first : buckets.stop - first].sum() for buckets in found]
    assert max(held) <= 10
    assert all(one + num_events[after.start - first] > 10 for one, after in zip(held, found[1:]))
    assert [*neighbours(np.array([30, 1, 30]), 10)] == [range(1), range(1, 2), range(2, 3)]
