import hashlib

import numpy as np
import pytest

from ksa_pipelines.vocab import user_bucket
from recsys_ksa.errors import ConfigError, SchemaError
from recsys_ksa.testing import lifelong_log

ITEMS = {
    "item_id": ["x", "y", "q", "x"],
    "kind": ["K", "", "L", "M"],
    "level": [10, 9, 8, 7],
    "title": ["X", None, "Q", "X2"],
}
LOG = {"user_id": ["a", "a", "b", "b"], "item_id": ["y", "x", "x", "z"], "timestamp": [1, 2, 3, 3]}


def test_items_are_numbered_by_first_time_then_bytes_of_the_id(prepared):
    log = {"user_id": list("aaabbb"), "item_id": ["é", "z", "b", "10", "9", "b"], "timestamp": [5, 5, 4, 4, 4, 9]}

    items = prepared(log).items

    assert items.item_id == [None, "10", "9", "b", "z", "é"]
    assert items.first_seen.tolist() == [-1, 4, 4, 4, 5, 5]
    assert items.count.tolist() == [0, 1, 1, 2, 1, 1]


def test_users_are_numbered_by_bucket_then_first_time_then_bytes_of_the_id(prepared):
    log = lifelong_log(3, 60, 20, median_length=4)
    first: dict[str, int] = {}
    for row in log.to_pylist():
        first[row["user_id"]] = min(first.get(row["user_id"], row["timestamp"]), row["timestamp"])
    expected, met = {}, dict.fromkeys(range(4), 0)
    for user in sorted(first, key=lambda user: (first[user], user.encode())):
        bucket = int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big") % 4
        expected[user] = bucket + 4 * met[bucket]
        met[bucket] += 1

    histories = prepared(log.to_pydict()).histories

    assert dict(zip(histories.user_ids(), histories.user_index.tolist())) == expected
    assert np.all(np.diff(histories.user_index) > 0)


def test_a_user_bucket_does_not_change():
    assert [user_bucket(user, 64) for user in ("1", "user", "é")] == [33, 41, 19]


def test_side_features_are_categories_with_0_for_unknown(prepared):
    dataset = prepared(LOG, catalogue=ITEMS, items={"side_features": ["kind", "level"]})

    assert dataset.items.item_id == [None, "y", "x", "z"]
    assert dataset.vocab == {"kind": [None, "K"], "level": [None, "10", "9"]}
    assert {name: column.tolist() for name, column in dataset.items.side.items()} == {
        "kind": [0, 0, 1, 0],
        "level": [0, 2, 1, 0],
    }
    assert dataset.manifest.side_features == ("kind", "level")
    assert dataset.manifest.items_described == 2


def test_titles_are_taken_where_the_items_file_has_them(prepared):
    assert prepared(LOG, catalogue=ITEMS).items.title == [None, None, "X", None]
    assert prepared(LOG, catalogue=ITEMS, items={"title": "kind"}).items.title == [None, None, "K", None]
    assert prepared(LOG, catalogue=ITEMS, items={"title": ""}).items.title is None
    assert prepared(LOG).items.title is None


def test_side_features_without_an_items_file_or_its_column_are_refused(prepared):
    with pytest.raises(SchemaError, match="Give --items FILE"):
        prepared(LOG, items={"side_features": ["kind"]})
    with pytest.raises(SchemaError, match="'colour', got item_id, kind, level, title"):
        prepared(LOG, catalogue=ITEMS, items={"side_features": ["colour"]})
    with pytest.raises(SchemaError, match="column 'weight': expected strings or integers"):
        prepared(LOG, catalogue={"item_id": ["x"], "weight": [0.5]}, items={"side_features": ["weight"]})


def test_event_types_beyond_an_int8_are_refused(prepared):
    log = {"user_id": ["a"] * 128, "item_id": ["x"] * 128, "timestamp": range(128), "event_type": range(128)}
    with pytest.raises(SchemaError, match="at most 127 types, got 128"):
        prepared(log)


def test_an_unknown_event_type_is_0(prepared):
    log = {"user_id": ["a"] * 3, "item_id": ["x"] * 3, "timestamp": [1, 2, 3], "event_type": ["b", None, "a"]}
    dataset = prepared(log)
    assert dataset.vocab["event_type"] == [None, "a", "b"]
    assert dataset.histories.event_type.tolist() == [2, 0, 1]


@pytest.mark.parametrize("name", ["event_type", "title", "../x", "a b"])
def test_side_features_need_names_that_make_files(prepared, name):
    with pytest.raises(ConfigError, match="expected names"):
        prepared(LOG, items={"side_features": [name]})
