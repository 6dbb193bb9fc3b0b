from collections import Counter

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from ksa_pipelines.clean import SAME_EVENT, SAME_ID, SAME_ID_OTHER_PAYLOAD, mark_duplicates
from ksa_pipelines.sources import ROW

EVENT = st.tuples(
    st.sampled_from("ab"), st.sampled_from("xy"), st.integers(0, 2), st.sampled_from([None, "buy", "see"])
)
IDS = st.sampled_from([None, "1", "2", "3"])


def slow_marks(rows: list[tuple]) -> list[str | None]:
    """What a loop says: rows are (user, item, time, type, event id)."""
    first_of_id: dict[tuple, tuple] = {}
    seen: set[tuple] = set()
    marks = []
    for user, *payload, event_id in rows:
        if event_id is None:
            marks.append(SAME_EVENT if (user, *payload) in seen else None)
            seen.add((user, *payload))
        elif (user, event_id) in first_of_id:
            same = first_of_id[user, event_id] == tuple(payload)
            marks.append(SAME_ID if same else SAME_ID_OTHER_PAYLOAD)
        else:
            first_of_id[user, event_id] = tuple(payload)
            marks.append(None)
    return marks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(EVENT, IDS), min_size=1, max_size=30), st.booleans())
def test_the_first_row_of_an_event_stays_and_later_ones_are_marked_by_rule(rows, has_ids):
    flat = [(*event, event_id if has_ids else None) for event, event_id in rows]
    columns = dict(zip(("user_id", "item_id", "timestamp", "event_type", "event_id"), map(list, zip(*flat))))
    if not has_ids:
        del columns["event_id"]
    schema = {name: pl.Int64 if name == "timestamp" else pl.String for name in columns}
    frame = pl.LazyFrame(columns, schema=schema).with_row_index(ROW)

    marks = mark_duplicates(frame, list(columns)).sort(ROW).collect()["duplicate"].to_list()

    assert marks == slow_marks(flat)


def test_duplicates_are_dropped_and_counted(prepared):
    log = {
        "user_id": ["a"] * 5,
        "item_id": ["x", "x", "x", "y", "y"],
        "timestamp": [1, 1, 1, 2, 3],
        "event_id": ["1", "1", "2", "3", "3"],
    }
    dataset = prepared(log)
    assert dataset.manifest.logs[0].duplicates == {SAME_ID: 1, SAME_ID_OTHER_PAYLOAD: 1}
    assert dataset.histories.timestamp.tolist() == [1, 1, 2]


def test_an_empty_event_id_is_no_id(prepared):
    log = {"user_id": ["a"] * 3, "item_id": ["x", "y", "y"], "timestamp": [1, 2, 2], "event_id": ["", "", ""]}
    dataset = prepared(log)
    assert dataset.manifest.logs[0].duplicates == {SAME_EVENT: 1}
    assert dataset.histories.num_events == 2


def test_items_are_filtered_first_then_users(prepared):
    users = ["a"] * 4 + ["b"] * 3
    items = ["x", "y", "x", "rare", "x", "y", "odd"]

    dataset = prepared(
        {"user_id": users, "item_id": items, "timestamp": list(range(7))}, min_item_count=2, min_user_events=3
    )

    assert dataset.histories.user_ids() == ["a"]
    assert Counter(dataset.items.item_id[index] for index in dataset.histories.item_index) == {"x": 2, "y": 1}
    assert dataset.manifest.logs[0].filtered == {
        "of items with fewer than 2": 2,
        "of users with then fewer than 3": 2,
    }
    assert dataset.items.count.tolist() == [0, 2, 1]
    assert dataset.manifest.config["min_item_count"] == 2
