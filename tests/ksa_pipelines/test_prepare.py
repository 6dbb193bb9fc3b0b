import collections

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys_ksa.order import order_key
from recsys_ksa.testing import lifelong_log, prepared_dataset


@pytest.mark.parametrize("kind", ["arrival", "hash", "id"])
def test_histories_are_the_logs_events_in_the_one_order(tmp_path, kind):
    log = lifelong_log(2, 25, 30, median_length=20, event_types=True, event_ids=kind == "id")
    rows = [row | {"arrival": number} for number, row in enumerate(log.to_pylist())]
    met, histories = set(), collections.defaultdict(list)
    for row in rows:
        event = row.get("event_id") or (row["user_id"], row["item_id"], row["timestamp"], row["event_type"])
        if event not in met:
            met.add(event)
            ids = {"event_id": row.get("event_id"), "event_type": row["event_type"], "arrival": row["arrival"]}
            key = order_key(kind, row["timestamp"], row["item_id"], **ids)
            histories[row["user_id"]].append((key, row["arrival"], row))

    dataset = prepared_dataset(tmp_path, log, arguments=["--tie", kind])

    assert dataset.manifest.counts.events == len(met)
    for number, user in enumerate(dataset.histories.user_ids()):
        expected = [row for _, _, row in sorted(histories[user], key=lambda entry: entry[:2])]
        events = dataset.histories.rows(number)
        items = [dataset.items.item_id[index] for index in dataset.histories.item_index[events]]
        types = [dataset.vocab["event_type"][index] for index in dataset.histories.event_type[events]]
        assert items == [row["item_id"] for row in expected]
        assert types == [row["event_type"] for row in expected]
        assert dataset.histories.timestamp[events].tolist() == [row["timestamp"] for row in expected]


def test_parts_hold_ties_and_event_ids_of_each_event(tmp_path):
    log = lifelong_log(2, 12, 30, median_length=10, event_ids=True)
    path = prepared_dataset(tmp_path, log, arguments=["--num-buckets", "1"]).path

    part = pq.read_table(path / "histories" / "part-00000-00000.parquet").to_pylist()

    assert sum(len(row["event_id"]) for row in part) == log.num_rows
    for row in part:
        assert row["tie"] == [event_id.encode() for event_id in row["event_id"]]
        assert len(row["item_index"]) == len(row["timestamp"]) == len(row["tie"])


def test_an_arrival_tie_is_the_number_of_the_logs_row(prepared):
    log = {"user_id": ["", "a", "a", "b"], "item_id": ["x", "y", "x", "z"], "timestamp": [1, 5, 5, 5]}
    dataset = prepared(log, num_buckets=1)
    rows = pq.read_table(dataset.path / "histories" / "part-00000-00000.parquet").to_pylist()
    ties = {row["user_id"]: [int.from_bytes(tie, "big") for tie in row["tie"]] for row in rows}
    assert ties == {"a": [1, 2], "b": [3]}


def test_counts_and_source_are_in_the_manifest(prepared):
    manifest = prepared({"user_id": list("aab"), "item_id": list("xyx"), "timestamp": [10, 20, 30]}).manifest
    counts = manifest.counts
    assert (counts.users, counts.items, counts.events) == (2, 2, 3)
    assert (counts.shortest_history, counts.median_history, counts.longest_history) == (1, 1.5, 2)
    (source,) = manifest.logs
    assert (source.number, source.first_arrival, source.num_rows) == (0, 0, 3)
    assert (source.rejected, source.duplicates, source.filtered) == ({}, {}, {})
    assert [file.name for file in source.files] == ["log.parquet"]
    assert str(manifest.config["columns"]["user_id"]) == "user_id"


def test_a_log_with_a_column_of_any_name_is_read(prepared):
    dataset = prepared({"user_id": ["a"], "item_id": ["x"], "timestamp": [1], "row": [9], "reason": ["r"]})
    assert dataset.histories.num_events == 1


def test_the_same_log_gives_the_same_bytes(prepared):
    log = lifelong_log(4, 15, 15, median_length=8).to_pydict()
    first, second = prepared(log), prepared(log)
    assert first.manifest.files == second.manifest.files
    assert np.array_equal(first.histories.item_index, second.histories.item_index)
