import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ksa.data.cache import CACHE, read_parts
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.data.hashes import content_hash, file_hash, row_digests
from recsys_ksa.data.manifest import read_manifest
from recsys_ksa.errors import DataError
from recsys_ksa.schema import SPLIT_COLUMNS
from recsys_ksa.testing import item_table, lifelong_log, prepared_dataset


def hash_of(histories: pa.Table) -> str:
    """The content hash of a table, whatever the order of its users."""
    return content_hash(histories.schema.names, row_digests(histories.sort_by("user_index")))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    log = lifelong_log(1, 30, 25, median_length=12, event_types=True, event_ids=True)
    return prepared_dataset(
        tmp_path_factory.mktemp("original"), log, items=item_table(25), arguments=["--num-buckets", "4"]
    ).path


@pytest.fixture
def path(original, tmp_path):
    """A data set of its own, to damage."""
    return shutil.copytree(original, tmp_path / "ds")


def test_the_arrays_have_the_stated_types_and_are_read_only_views(original):
    dataset = open_dataset(original)
    histories = dataset.histories
    types = {"user_index": np.int64, "offsets": np.int64, "item_index": np.int32, "timestamp": np.int64}
    for name, dtype in (types | {"event_type": np.int8}).items():
        array = getattr(histories, name)
        assert array.dtype == dtype
        assert not array.flags.writeable
    assert tuple(histories.split) == SPLIT_COLUMNS
    assert all(column.dtype == np.int32 for column in histories.split.values())
    assert {column.dtype for column in dataset.items.side.values()} == {np.dtype(np.int32)}
    assert dataset.items.count.dtype == dataset.items.first_seen.dtype == np.int64


def test_sizes_agree(original):
    dataset = open_dataset(original)
    histories = dataset.histories
    assert histories.num_users == 30 == len(histories.user_ids())
    assert histories.offsets[0] == 0
    assert histories.offsets[-1] == histories.num_events == dataset.manifest.counts.events
    assert [histories.length(user) for user in range(30)] == histories.lengths.tolist()
    assert np.array_equal(np.bincount(histories.item_index, minlength=dataset.num_items), dataset.items.count)
    assert dataset.item_index["i3"] == dataset.items.item_id.index("i3")
    assert None not in dataset.item_index


def test_times_never_decrease_within_a_user(original):
    histories = open_dataset(original).histories
    for user in range(histories.num_users):
        assert np.all(np.diff(histories.timestamp[histories.rows(user)]) >= 0)


def test_a_missing_cache_is_rebuilt_and_equal(path):
    before = open_dataset(path).histories
    shutil.rmtree(path / "cache")
    after = open_dataset(path).histories
    assert (path / CACHE).is_file()
    for name in ("user_index", "offsets", "item_index", "timestamp", "event_type"):
        assert np.array_equal(getattr(before, name), getattr(after, name))
    assert before.user_ids() == after.user_ids()
    assert all(np.array_equal(column, after.split[name]) for name, column in before.split.items())


@pytest.mark.parametrize("seal", ["{}", "not json", '{"sha256": "0", "content_hash": "0", "split_hash": "0"}'])
def test_a_cache_of_other_data_is_rebuilt(path, seal):
    (path / "cache" / "histories.json").write_text(seal)
    assert open_dataset(path).histories.num_users == 30


def test_an_altered_cache_is_refused(path):
    raw = bytearray((path / CACHE).read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / CACHE).write_bytes(raw)
    with pytest.raises(DataError, match=r"the cache was altered\. Delete"):
        open_dataset(path)


@pytest.mark.parametrize("name", ["items.parquet", "vocab/category.parquet", "vocab/event_type.parquet"])
def test_an_altered_or_missing_table_is_refused(path, name):
    (path / name).write_bytes((path / name).read_bytes() + b"x")
    with pytest.raises(DataError, match=f"{name}: expected sha256"):
        open_dataset(path)
    (path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: expected a file of the data set"):
        open_dataset(path)


def test_an_altered_part_is_refused_when_the_cache_is_rebuilt(path):
    shutil.rmtree(path / "cache")
    part = path / "histories" / "part-00000-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DataError, match="the file was altered"):
        open_dataset(path)


def test_parts_that_do_not_give_the_content_hash_are_refused(path):
    shutil.rmtree(path / "cache")
    values = json.loads((path / "manifest.json").read_text())
    values["content_hash"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="expected content_hash 000000000000"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values | {"format_version": 99}, "expected format_version 2, got 99"),
        (lambda values: {name: value for name, value in values.items() if name != "tie"}, "tie"),
        (lambda values: values | {"surprise": 1}, "surprise"),
        (lambda values: [], "expected format_version 2"),
    ],
)
def test_another_manifest_is_refused(path, change, said):
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(change(values)))
    with pytest.raises(DataError, match=said):
        open_dataset(path)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="Run `ksa prepare` first"):
        open_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="expected JSON"):
        open_dataset(tmp_path)


def test_counts_that_disagree_with_the_tables_are_refused(path):
    values = json.loads((path / "manifest.json").read_text())
    values["counts"]["events"] += 1
    (path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="events, got"):
        open_dataset(path)


def test_the_content_hash_ignores_the_order_of_users_and_how_rows_are_chunked(original):
    manifest = read_manifest(original)
    table = read_parts(original, manifest)
    reversed_rows = table.take(pa.array(range(table.num_rows - 1, -1, -1)))
    chunked = pa.concat_tables([table.slice(0, 7), table.slice(7)])
    assert {hash_of(each) for each in (table, reversed_rows, chunked)} == {manifest.content_hash}


def test_the_content_hash_sees_every_column(original):
    table = read_parts(original, read_manifest(original))
    row = table.slice(0, 1).to_pylist()[0]
    changes = {
        "user_id": row["user_id"][::-1],
        "user_index": row["user_index"] + 4,
        "item_index": [row["item_index"][0] + 1, *row["item_index"][1:]],
        "timestamp": [*row["timestamp"][:-1], row["timestamp"][-1] + 1],
        "tie": [row["tie"][0] + b"x", *row["tie"][1:]],
        "event_id": ["other", *row["event_id"][1:]],
        "event_type": [3 - row["event_type"][0], *row["event_type"][1:]],
    }
    assert row["user_id"] != row["user_id"][::-1]
    hashes = {hash_of(pa.Table.from_pylist([row], schema=table.schema))}
    for name, value in changes.items():
        hashes.add(hash_of(pa.Table.from_pylist([row | {name: value}], schema=table.schema)))
    assert len(hashes) == len(changes) + 1


def test_the_content_hash_sees_where_one_id_ends_and_the_next_begins(original):
    table = read_parts(original, read_manifest(original))
    row = next(row for row in table.to_pylist() if len(row["tie"]) > 1)
    first, second, *others = row["tie"]
    moved = row | {"tie": [first + second[:1], second[1:], *others]}
    hashes = {hash_of(pa.Table.from_pylist([each], schema=table.schema)) for each in (row, moved)}
    assert len(hashes) == 2


def test_the_newest_parts_row_of_a_user_counts(path):
    """Seam of increments: a later log's part replaces the rows of the users it touched."""
    manifest = read_manifest(path)
    older = read_parts(path, manifest)
    newer = older.slice(3, 1)
    name = f"histories/part-00001-{newer.column('user_index')[0].as_py() % 4:05d}.parquet"
    newer = newer.set_column(newer.schema.get_field_index("user_id"), newer.schema.field("user_id"), [["newer"]])
    pq.write_table(newer, path / name)
    rows = [*older.slice(0, 3).to_pylist(), newer.to_pylist()[0], *older.slice(4).to_pylist()]
    expected = hash_of(pa.Table.from_pylist(rows, schema=older.schema))
    files = manifest.files | {name: file_hash(path / name)}
    table = read_parts(path, manifest.model_copy(update={"files": files, "content_hash": expected}))
    assert table.column("user_id").to_pylist() == [row["user_id"] for row in rows]


def test_a_data_set_opens_where_torch_and_polars_are_not(original):
    code = (
        "import sys\n"
        "for name in ('torch', 'polars', 'mlflow', 'faiss'): sys.modules[name] = None\n"
        "from recsys_ksa.data.dataset import open_dataset\n"
        f"print(open_dataset({str(original)!r}).histories.num_users)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.stdout.strip(), ended.returncode) == ("30", 0), ended.stderr
