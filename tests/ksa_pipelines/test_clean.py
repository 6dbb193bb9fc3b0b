from collections import Counter

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from ksa_pipelines.clean import SAME_EVENT, SAME_ID, SAME_ID_OTHER_PAYLOAD, drop_duplicates

EVENT = st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(0, 2), st.sampled_from([-1, 0, 1]))
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


def frame_of(rows: list[tuple], has_ids: bool) -> pl.DataFrame:
    """Rows with users and items as codes, in order of arrival."""
    flat = [("ab".index(user), "xy".index(item), *others, event_id) for (user, item, *others), event_id in rows]
    kinds = {"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Int64, "event_type": pl.Int32, "event_id": pl.String}
    frame = pl.DataFrame(flat, schema=kinds, orient="row").with_row_index("arrival")
    return frame if has_ids else frame.drop("event_id")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(EVENT, IDS), min_size=1, max_size=30), st.integers(0, 29), st.booleans())
def test_the_first_event_by_arrival_stays_and_later_ones_are_dropped_by_rule(rows, num_old, has_ids):
    marks = slow_marks([(*event, event_id if has_ids else None) for event, event_id in rows])
    events = frame_of(rows, has_ids)
    num_old = min(num_old, len(rows) - 1)
    # What is old was cleaned when it came; its order within a second does not matter, nor that of the new.
    old = events.head(num_old).filter(pl.Series([mark is None for mark in marks[:num_old]], dtype=pl.Boolean))
    old = old.drop("arrival").sample(fraction=1.0, shuffle=True, seed=1).sort("user", "timestamp")
    new = events.tail(len(rows) - num_old).sort("user", "timestamp", "arrival")

    kept, dropped = drop_duplicates(new, old if num_old else None)

    expected = [number for number in range(num_old, len(rows)) if marks[number] is None]
    assert kept["arrival"].to_list() == [number for number in new["arrival"] if number in expected]
    assert Counter(dropped) == Counter(mark for mark in marks[num_old:] if mark)


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
