import polars as pl
import pytest

from recsys_ksa.errors import DataError, SchemaError


def test_each_kind_of_bad_row_is_counted_by_its_reason(prepared):
    rows = [
        ("a", "x", 1),
        (None, "x", 2),
        ("", "x", 3),
        ("a", None, 4),
        ("a", "", 5),
        ("a", "x", None),
        ("a", "x", -1),
        ("a", "x", 5_000_000_000),
        ("a", "y", 4_102_444_800),
        (None, None, None),
    ]
    log = dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows))))

    dataset = prepared(log)

    assert dataset.histories.timestamp.tolist() == [1, 4_102_444_800]
    assert dataset.manifest.logs[0].num_rows == 10
    assert dataset.manifest.logs[0].rejected == {
        "null user_id": 2,
        "empty user_id": 1,
        "null item_id": 1,
        "empty item_id": 1,
        "null or unreadable timestamp": 1,
        "negative timestamp": 1,
        "far-future timestamp": 1,
    }


def test_milliseconds_are_refused_unless_the_clock_is_relative(prepared):
    log = {"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [100_000_000_001, 100_000_000_002]}
    with pytest.raises(SchemaError, match=r"expected Unix seconds, got 100000000002 .*Say time_unit = 'ms'"):
        prepared(log)
    assert prepared(log, clock="relative").histories.num_events == 2


@pytest.mark.parametrize(
    ("rows", "why"), [("", "the log has no rows"), (",x,1\na,,1\n", "1 null item_id, 1 null user_id")]
)
def test_a_log_without_events_is_refused_with_the_reason(prepared, tmp_path, rows, why):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + rows)
    with pytest.raises(DataError, match=why):
        prepared(tmp_path / "log.csv")


def test_a_parquet_log_without_rows_is_refused(prepared):
    log = pl.DataFrame(schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64})
    with pytest.raises(DataError, match="the log has no rows"):
        prepared(log)


def test_filters_that_leave_nothing_are_refused_with_the_reason(prepared):
    log = {"user_id": ["a"], "item_id": ["x"], "timestamp": [1]}
    with pytest.raises(DataError, match="1 of items with fewer than 2"):
        prepared(log, min_item_count=2)


def test_one_user_with_one_event_is_a_data_set(prepared):
    dataset = prepared({"user_id": ["a"], "item_id": ["x"], "timestamp": [1_000_000_000]})
    histories = dataset.histories
    assert (histories.num_users, histories.num_events, dataset.num_items) == (1, 1, 2)
    assert {name: column.tolist() for name, column in histories.split.items()} == {
        "loo_valid": [1],
        "loo_test": [1],
        "global_valid": [0],
        "global_test": [0],
    }
