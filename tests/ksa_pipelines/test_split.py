import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ksa_pipelines.config import SplitConfig
from ksa_pipelines.split import DAY, global_cuts, split_positions
from recsys_ksa.schema import SPLIT_COLUMNS

HISTORY = st.lists(st.integers(0, 12), min_size=1, max_size=15).map(sorted)


def slow_positions(times: list[int], valid_start: int, test_start: int) -> dict[str, int]:
    """Position by position, as the protocol is worded."""
    length, distinct = len(times), sorted(set(times))
    loo = (length, length) if len(distinct) < 3 else (times.index(distinct[-2]), times.index(distinct[-1]))
    cut = [next((n for n, time in enumerate(times) if time >= start), length) for start in (valid_start, test_start)]
    return dict(zip(SPLIT_COLUMNS, (*loo, *cut)))


@settings(max_examples=200, deadline=None)
@given(st.lists(HISTORY, min_size=1, max_size=6), st.integers(-2, 14), st.integers(0, 5))
def test_positions_are_those_of_a_slow_loop(histories, valid_start, days):
    timestamp = np.concatenate([np.array(times, dtype=np.int64) for times in histories])
    offsets = np.concatenate([[0], np.cumsum([len(times) for times in histories])])
    cuts = {"valid_start": valid_start, "test_start": valid_start + days, "log_end": int(timestamp.max())}

    positions = split_positions(timestamp, offsets, {"global": cuts})

    for user, times in enumerate(histories):
        expected = slow_positions(times, valid_start, valid_start + days)
        assert {name: int(column[user]) for name, column in positions.items()} == expected
    assert tuple(positions) == SPLIT_COLUMNS
    assert all(column.dtype == np.int32 for column in positions.values())


def test_the_global_cut_is_28_days_before_the_logs_last_event_and_14_before_those():
    assert global_cuts(SplitConfig(), "unix", 100 * DAY) == {
        "global": {"valid_start": 58 * DAY, "test_start": 72 * DAY, "log_end": 100 * DAY}
    }


def test_an_ordinal_clock_has_no_global_cut(prepared):
    log = {"user_id": ["a"] * 4, "item_id": list("wxyz"), "timestamp": [0, 1, 2, 3]}
    dataset = prepared(log, clock="ordinal")
    assert dataset.manifest.split == {}
    assert dataset.histories.split["global_valid"].tolist() == [4]
    assert dataset.histories.split["global_test"].tolist() == [4]
    assert dataset.histories.split["loo_test"].tolist() == [3]


def test_the_cut_is_configured_and_in_the_manifest(prepared):
    log = {"user_id": ["a"] * 4, "item_id": list("wxyz"), "timestamp": [0, DAY, 2 * DAY, 3 * DAY]}
    dataset = prepared(log, split={"test_days": 0.5, "validation_days": 1})
    cuts = dataset.manifest.split["global"]
    assert cuts == {"valid_start": 3 * DAY // 2, "test_start": 5 * DAY // 2, "log_end": 3 * DAY}
    assert dataset.histories.split["global_valid"].tolist() == [2]
    assert dataset.histories.split["global_test"].tolist() == [3]


def test_the_split_hash_follows_the_split_and_the_content_hash_does_not(prepared):
    log = {"user_id": ["a"] * 4, "item_id": list("wxyz"), "timestamp": [0, DAY, 2 * DAY, 3 * DAY]}
    first, second = prepared(log).manifest, prepared(log, split={"test_days": 1}).manifest
    assert first.content_hash == second.content_hash
    assert first.split_hash != second.split_hash
