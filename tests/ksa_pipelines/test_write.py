import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ksa_pipelines.write import atomic_directory
from recsys_ksa.data.manifest import file_hash
from recsys_ksa.errors import DataError
from recsys_ksa.schema import ITEMS, VOCABULARY, histories_schema
from recsys_ksa.testing import item_table, lifelong_log, prepared_dataset


def test_an_existing_target_is_refused_before_anything_is_read(prepared, tmp_path):
    (tmp_path / "ds").mkdir()
    with pytest.raises(DataError, match="does not exist yet"), atomic_directory(tmp_path / "ds"):
        pytest.fail("the body ran")


def test_an_error_midway_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with atomic_directory(tmp_path / "new" / "ds") as directory:
            (directory / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    def full() -> None:
        with atomic_directory(tmp_path / "new" / "ds"):
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="ds: expected to write it, got: No space left on device"):
        full()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="expected to write it"), atomic_directory(tmp_path / "file" / "ds"):
        pytest.fail("the body ran")


def test_a_kill_midway_leaves_no_data_set(tmp_path):
    lifelong = lifelong_log(0, 5, 5, median_length=5)
    pq.write_table(lifelong, tmp_path / "log.parquet")
    code = (
        "import os, signal, ksa_pipelines.prepare as p\n"
        "p.write_cache = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from recsys_ksa.cli import call_verb\n"
        f"call_verb('prepare', [{str(tmp_path / 'log.parquet')!r}, '--out', {str(tmp_path / 'ds')!r}])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "ds").exists()
    assert all(path.name.startswith(".ds.") or path.name == "log.parquet" for path in tmp_path.iterdir())


def test_the_files_are_those_of_the_layout_and_the_manifest_has_their_hashes(tmp_path):
    log = lifelong_log(1, 30, 20, median_length=10, event_types=True, event_ids=True)

    dataset = prepared_dataset(tmp_path, log, items=item_table(20), arguments=["--num-buckets", "4"])

    files = {path.relative_to(dataset.path).as_posix() for path in dataset.path.rglob("*") if path.is_file()}
    parts = {f"histories/part-00000-{bucket:05d}.parquet" for bucket in range(4)}
    tables = {"items.parquet", "vocab/category.parquet", "vocab/event_type.parquet"} | parts
    caches = {"cache/histories.arrow", "cache/histories.json"}
    caches |= {f"cache/rows-00000-{bucket:05d}.arrow" for bucket in range(4)}
    assert files == tables | caches | {"manifest.json"}
    assert dataset.manifest.files == {name: file_hash(dataset.path / name) for name in tables}


def test_the_tables_have_the_librarys_schemas(tmp_path):
    log = lifelong_log(1, 30, 20, median_length=10, event_types=True, event_ids=True)
    path = prepared_dataset(tmp_path, log, items=item_table(20), arguments=["--num-buckets", "2"]).path

    part = pq.read_table(path / "histories" / "part-00000-00001.parquet")
    items = pq.read_table(path / "items.parquet")

    assert part.schema.equals(histories_schema(has_event_type=True, has_event_id=True))
    assert set((part.column("user_index").to_numpy() % 2).tolist()) == {1}
    assert items.schema.names == [*ITEMS.names, "category_index", "title"]
    assert all(items.schema.field(field.name).equals(field) for field in ITEMS)
    assert pq.read_schema(path / "vocab" / "category.parquet").equals(VOCABULARY)


def test_folders_above_the_data_set_are_made(tmp_path):
    with atomic_directory(Path(tmp_path / "a" / "b" / "ds")) as directory:
        (directory / "file").write_text("x")
    assert (tmp_path / "a" / "b" / "ds" / "file").read_text() == "x"
