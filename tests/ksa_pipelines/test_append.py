import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksa_pipelines import memory
from ksa_pipelines.append import append_log
from ksa_pipelines.compact import compact
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.insert import insert_events
from ksa_pipelines.prepare import prepare
from ksa_pipelines.reference import Reference
from recsys_ksa.config import parse_config
from recsys_ksa.data.cache import read_parts
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.data.manifest import read_manifest
from recsys_ksa.errors import DataError, SchemaError

ROW = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["a", "b", "c", "d", "é", "f"]),
        "item_id": st.sampled_from([f"i{n}" for n in range(9)]),
        "timestamp": st.integers(0, 9) | st.integers(0, 10**6),
        "event_type": st.sampled_from([None, "buy", "see", "zap"]),
        "event_id": st.sampled_from([None, *"0123456789"]),
    }
)
LOGS = st.lists(st.lists(ROW, min_size=1, max_size=14), min_size=2, max_size=4)
TYPES = {
    "user_id": pl.String,
    "item_id": pl.String,
    "timestamp": pl.Int64,
    "event_type": pl.String,
    "event_id": pl.String,
}


def said(line: str) -> None:
    """Takes a step's line and drops it."""


def write(rows: list[dict], columns: list[str], path: Path) -> str:
    pl.DataFrame(rows, schema=TYPES).select(columns).write_parquet(path)
    return str(path)


def columns_of(has_types: bool, has_ids: bool) -> list[str]:
    optional = [name for name, has in (("event_type", has_types), ("event_id", has_ids)) if has]
    return ["user_id", "item_id", "timestamp", *optional]


def check_against(reference: Reference, path: Path, columns: list[str]) -> None:
    """The data set holds what the reference says, read through the cache and from the parts."""
    dataset = open_dataset(path)
    lists = ["item_index", "timestamp", "tie", *columns[3:]]
    expected = [{name: row[name] for name in ("user_id", "user_index", *lists)} for row in reference.rows()]
    table = read_parts(path, dataset.manifest)
    found = table.select(["user_id", "user_index", *lists]).to_pylist()
    assert found == expected
    histories = dataset.histories
    assert histories.user_index.tolist() == [row["user_index"] for row in expected]
    assert histories.user_ids() == [row["user_id"] for row in expected]
    assert histories.item_index.tolist() == [item for row in expected for item in row["item_index"]]
    assert histories.timestamp.tolist() == [time for row in expected for time in row["timestamp"]]
    assert dataset.items.item_id[1:] == list(reference.items)
    assert dataset.items.count[0] == 0
    counts = reference.counts()
    assert dict(zip(dataset.items.item_id[1:], zip(dataset.items.count[1:], dataset.items.first_seen[1:]))) == counts
    if "event_type" in columns:
        assert dataset.vocab["event_type"] == [None, *reference.types]
    log_end = max(max(row["timestamp"]) for row in expected)
    cuts = dataset.manifest.split["global"]
    assert cuts["log_end"] == log_end
    before = [sum(time < cuts["test_start"] for time in row["timestamp"]) for row in expected]
    assert histories.split["global_test"].tolist() == before


@settings(max_examples=12, deadline=None)
@given(LOGS, st.booleans(), st.booleans(), st.sampled_from([None, "arrival", "hash"]), st.data())
def test_appended_logs_give_what_the_rules_say_and_a_replay_gives_it_again(logs, has_types, has_ids, tie, data):
    columns = columns_of(has_types, has_ids)
    compacted = {number for number in range(len(logs)) if data.draw(st.booleans(), label=f"compact after {number}")}
    config = parse_config(PrepareConfig, {"num_buckets": 3, "tie": tie, "split": {"test_days": 1}}, "test")
    together = data.draw(st.sampled_from([1, 6, 1 << 17]), label="events of small buckets that are held together")
    reference = Reference(tie or ("id" if has_ids else "arrival"), 3)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "TOGETHER", together)
        paths = []
        for number, rows in enumerate(logs):
            rows = [{name: row[name] for name in columns} for row in rows]
            reference.append(rows)
            paths.append(write(rows, columns, Path(folder) / f"log-{number}.parquet"))
        for target, compacts in ((Path(folder) / "one", compacted), (Path(folder) / "two", set())):
            prepare(paths[0], target, config, None, said)
            for number, path in enumerate(paths[1:]):
                append_log(target, path, said)
                if number in compacts:
                    compact(target, said)
        check_against(reference, Path(folder) / "one", columns)
        one, two = read_manifest(Path(folder) / "one"), read_manifest(Path(folder) / "two")
        assert (one.content_hash, one.split_hash) == (two.content_hash, two.split_hash)
        assert one.logs == two.logs
        assert one.counts == two.counts
        for name in one.tables:
            assert one.files[one.table_file(name)] == two.files[two.table_file(name)]


@given(st.data(), st.sampled_from(["arrival", "id"]))
def test_events_are_inserted_where_a_sort_puts_them(data, kind):
    key = st.tuples(st.integers(0, 3) | st.sampled_from([2**62, -(2**62)]), st.binary(max_size=2))
    users = data.draw(st.lists(st.tuples(st.lists(key, max_size=6), st.lists(key, min_size=1, max_size=6)), min_size=1))
    if kind == "arrival":  # a tie is larger than all that came before
        users = [([(time, b"0") for time, _ in old], [(time, b"1") for time, _ in new]) for old, new in users]
    sides = [[sorted(user[side]) for user in users] for side in (0, 1)]

    def lists(histories: list[list[tuple]]) -> tuple:
        events = [event for history in histories for event in history]
        columns = {"timestamp": pa.array([time for time, _ in events], pa.int64())}
        columns["tie"] = pa.array([tie for _, tie in events], pa.large_binary())
        return columns, np.cumsum([0, *map(len, histories)])

    found, offsets = insert_events(*lists(sides[0]), *lists(sides[1]), kind)

    expected, ends = lists([sorted(old + new) for old, new in zip(*sides)])
    assert {name: column.to_pylist() for name, column in found.items()} == {
        name: column.to_pylist() for name, column in expected.items()
    }
    assert offsets.tolist() == ends.tolist()


FIRST = {"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"], "timestamp": [10, 30, 20]}


@pytest.fixture
def log(tmp_path):
    """Write columns as a log; return its path."""

    def make(**columns) -> str:
        path = tmp_path / f"log-{len(list(tmp_path.glob('log-*')))}.parquet"
        pl.DataFrame(columns).write_parquet(path)
        return str(path)

    return make


def test_only_touched_users_are_written_and_late_events_land_in_their_place(prepared, log):
    path = prepared(FIRST, num_buckets=1).path

    append_log(path, log(user_id=["a", "c"], item_id=["z", "x"], timestamp=[20, 5]), said)

    delta = pl.read_parquet(path / "histories" / "part-00001-00000.parquet")
    assert delta["user_id"].to_list() == ["a", "c"]
    assert delta["timestamp"].to_list() == [[10, 20, 30], [5]]
    histories = open_dataset(path).histories
    assert histories.user_ids() == ["a", "b", "c"]
    assert histories.timestamp.tolist() == [10, 20, 30, 20, 5]


@pytest.mark.parametrize("num_buckets", [1, 3])
def test_users_whose_newest_rows_lie_in_parts_of_several_versions_stay_who_they_are(prepared, log, num_buckets):
    path = prepared(FIRST, num_buckets=num_buckets).path
    logs = ["b", "ab", "cdef", "a", "fedcba", "ace", "bdf", "abcdef"]
    for number, users in enumerate(logs):
        append_log(path, log(user_id=[*users], item_id=["z"] * len(users), timestamp=[40 + number] * len(users)), said)
    histories = open_dataset(path).histories
    found = dict(zip(histories.user_ids(), np.split(histories.timestamp, histories.offsets[1:-1])))
    first = {"a": [10, 30], "b": [20]}
    for user in "abcdef":
        later = [40 + number for number, users in enumerate(logs) if user in users]
        assert found[user].tolist() == first.get(user, []) + later
    for bucket in range(num_buckets):
        numbers = [index for index in histories.user_index.tolist() if index % num_buckets == bucket]
        assert numbers == [bucket + num_buckets * n for n in range(len(numbers))]


def test_the_same_log_again_adds_nothing_but_its_counts(prepared, log):
    dataset = prepared(FIRST)
    after = append_log(dataset.path, log(**FIRST), said)
    assert after.content_hash == dataset.manifest.content_hash
    assert after.logs[1].duplicates == {"same user, item, time and type": 3}
    assert after.logs[1].first_arrival == 3
    assert after.version == 1


def test_new_items_take_their_side_features_from_the_new_items_file(prepared, log, tmp_path):
    items = {"item_id": ["x", "y"], "kind": ["K", "L"], "title": ["X", "Y"]}
    dataset = prepared(FIRST, catalogue=items, items={"side_features": ["kind"]})
    pl.DataFrame({"item_id": ["z", "x"], "kind": ["A", "B"], "title": ["Z", "X2"]}).write_parquet(
        tmp_path / "more.parquet"
    )

    append_log(
        dataset.path,
        log(user_id=["a"] * 2, item_id=["z", "w"], timestamp=[40, 41]),
        said,
        items=str(tmp_path / "more.parquet"),
    )

    after = open_dataset(dataset.path)
    assert after.items.item_id == [None, "x", "y", "z", "w"]
    assert after.items.title == [None, "X", "Y", "Z", None]
    assert after.vocab["kind"] == [None, "K", "L", "A"]
    assert after.items.side["kind"].tolist() == [0, 1, 2, 3, 0]
    assert after.manifest.items_described == 3


@pytest.mark.parametrize(
    ("columns", "error", "said_so"),
    [
        ({"user_id": ["a"], "item_id": ["x"], "timestamp": [1], "event_id": ["e"]}, SchemaError, "optional columns"),
        ({"user_id": ["a"], "item_id": ["x"]}, SchemaError, "'timestamp'"),
        ({"user_id": [None], "item_id": ["x"], "timestamp": [1]}, DataError, "1 null user_id"),
        ({"user_id": ["a"], "item_id": ["x"], "timestamp": [10**12]}, SchemaError, "milliseconds"),
    ],
)
def test_a_refused_log_leaves_the_old_version(prepared, log, columns, error, said_so):
    path = prepared(FIRST).path
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(error, match=said_so):
        append_log(path, log(**columns), said)
    after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != ".lock"}
    assert after == before


def test_a_filtered_data_set_takes_no_increments(prepared, log):
    path = prepared(FIRST, min_user_events=1, min_item_count=2).path
    with pytest.raises(DataError, match="without filters"):
        append_log(path, log(**FIRST), said)


def test_two_writers_do_not_meet(prepared, log):
    path = prepared(FIRST).path

    met = []

    def second(line: str) -> None:
        if met:
            return
        met.append(line)
        with pytest.raises(DataError, match="another process is changing"):
            append_log(path, log(**FIRST), said)

    append_log(path, log(**FIRST), second)
    assert met


def test_an_earlier_version_stays_readable_until_it_is_compacted(prepared, log):
    dataset = prepared(FIRST)
    append_log(dataset.path, log(user_id=["a"], item_id=["z"], timestamp=[99]), said)
    earlier = open_dataset(dataset.path, version=0)
    assert earlier.manifest == dataset.manifest
    assert earlier.histories.timestamp.tolist() == dataset.histories.timestamp.tolist()
    compact(dataset.path, said)
    with pytest.raises(DataError, match="00000"):
        open_dataset(dataset.path, version=0)
    assert open_dataset(dataset.path).histories.num_events == 4
