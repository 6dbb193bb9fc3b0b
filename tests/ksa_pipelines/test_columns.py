from datetime import date, datetime, timedelta, timezone

import polars as pl
import pytest

from recsys_ksa.errors import SchemaError

IDS = {"user_id": ["a", "b"], "item_id": ["x", "y"]}


def times(dataset) -> list[int]:
    return sorted(dataset.histories.timestamp.tolist())


def test_a_missing_column_says_which_are_there(prepared):
    with pytest.raises(SchemaError, match=r"expected a column 'item_id', got user_id, thing, timestamp\."):
        prepared({"user_id": ["a"], "thing": ["x"], "timestamp": [1]})


def test_columns_are_mapped_by_the_config(prepared):
    log = {"who": [7], "what": [3], "when": [50], "how": ["buy"]}
    columns = {"user_id": "who", "item_id": "what", "timestamp": "when", "event_type": "how"}

    dataset = prepared(log, columns=columns)

    assert dataset.histories.user_ids() == ["7"]
    assert dataset.items.item_id == [None, "3"]
    assert dataset.vocab["event_type"] == [None, "buy"]
    assert dataset.histories.event_type is not None
    assert dataset.histories.event_type.tolist() == [1]


def test_a_mapped_optional_column_must_be_there_and_an_empty_name_leaves_it_out(prepared):
    log = {"user_id": ["a"], "item_id": ["x"], "timestamp": [1], "event_type": ["buy"]}
    with pytest.raises(SchemaError, match="'kind'"):
        prepared(log, columns={"event_type": "kind"})
    assert not prepared(log, columns={"event_type": ""}).manifest.has_event_type


@pytest.mark.parametrize("values", [[1.5, 2.5], [True, False], [[1], [2]]])
def test_ids_of_a_wrong_type_are_refused(prepared, values):
    with pytest.raises(SchemaError, match="column 'item_id': expected strings or integers"):
        prepared({"user_id": ["a", "b"], "item_id": values, "timestamp": [1, 2]})


@pytest.mark.parametrize("values", [[1.0, 2.0], [True, False]])
def test_times_of_a_wrong_type_are_refused(prepared, values):
    with pytest.raises(SchemaError, match="column 'timestamp': expected integers"):
        prepared(IDS | {"timestamp": values})


def test_categories_are_ids(prepared):
    log = pl.DataFrame(IDS | {"timestamp": [1, 2]}).with_columns(pl.col("item_id").cast(pl.Categorical))
    assert prepared(log).items.item_id == [None, "x", "y"]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_datetimes_become_unix_seconds_and_no_zone_is_utc(prepared, unit):
    moments = [datetime(2017, 1, 1, 11, 53, 26, 900_000), datetime(1970, 1, 1, 0, 0, 1)]
    log = pl.DataFrame(IDS | {"timestamp": moments}).with_columns(pl.col("timestamp").cast(pl.Datetime(unit)))
    assert times(prepared(log)) == [1, 1_483_271_606]


def test_datetimes_with_a_zone_are_the_same_moment(prepared):
    zone = timezone(timedelta(hours=2))
    log = {"user_id": ["a"], "item_id": ["x"], "timestamp": [datetime(2020, 1, 1, 2, tzinfo=zone)]}
    assert times(prepared(log)) == [1_577_836_800]


def test_dates_are_their_midnight(prepared):
    assert times(prepared(IDS | {"timestamp": [date(1970, 1, 2), date(1970, 1, 3)]})) == [86_400, 172_800]


def test_times_written_as_text_are_seconds_or_datetimes(prepared, tmp_path):
    rows = ["10", " 20 ", "1970-01-01 00:00:30", "1970-01-01T00:00:40Z", "soon"]
    text = "user_id,item_id,timestamp\n" + "".join(f"a,x{n},{row}\n" for n, row in enumerate(rows))
    (tmp_path / "log.csv").write_text(text)

    dataset = prepared(tmp_path / "log.csv")

    assert times(dataset) == [10, 20, 30, 40]
    assert dataset.manifest.logs[0].rejected == {"null or unreadable timestamp": 1}
