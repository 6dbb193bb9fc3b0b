import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_ksa.features import NO_GAP, NUM_GAP_BUCKETS, gap_bucket, gap_buckets, history_gap_buckets, request_bucket

EDGES = sorted({max(0, 2**power + step) for power in range(63) for step in (-2, -1, 0, 1)})


@pytest.mark.parametrize(
    ("gap", "bucket"), [(-5, 1), (0, 1), (1, 2), (2, 2), (3, 3), (6, 3), (7, 4), (3_599, 12), (86_400, 17)]
)
def test_a_gap_s_bucket_is_the_bit_length_of_gap_plus_1(gap, bucket):
    assert gap_bucket(gap) == bucket
    assert gap_buckets(np.array([gap])).tolist() == [bucket]


def test_every_power_of_two_begins_a_bucket_up_to_the_last():
    for power in range(NUM_GAP_BUCKETS - 2):
        assert gap_bucket(2**power - 1) == power + 1
        assert gap_bucket(2 ** (power + 1) - 2) == power + 1
    assert gap_bucket(2**62) == NUM_GAP_BUCKETS - 1


def test_whole_columns_are_integer_exact_at_every_edge_beyond_2_to_the_53():
    gaps = np.array([gap for gap in EDGES if gap < 2**63], dtype=np.int64)
    assert gap_buckets(gaps).tolist() == [gap_bucket(gap) for gap in gaps.tolist()]
    assert {2**53 - 1, 2**53, 2**53 + 1} <= set(gaps.tolist())


@given(st.lists(st.integers(-(2**62), 2**62), max_size=30))
def test_whole_columns_equal_one_gap_at_a_time(gaps):
    assert gap_buckets(np.array(gaps, dtype=np.int64)).tolist() == [gap_bucket(gap) for gap in gaps]


@given(st.lists(st.lists(st.integers(0, 2**40), max_size=6).map(sorted), max_size=5))
def test_a_history_s_first_event_has_no_gap_and_histories_do_not_touch(histories):
    timestamp = np.array([time for times in histories for time in times], dtype=np.int64)
    offsets = np.cumsum([0, *(len(times) for times in histories)]).astype(np.int64)

    found = history_gap_buckets(timestamp, offsets).tolist()

    expected = [
        NO_GAP if place == 0 else gap_bucket(time - times[place - 1])
        for times in histories
        for place, time in enumerate(times)
    ]
    assert found == expected


def test_a_request_without_time_or_events_has_no_gap_and_an_early_one_counts_as_0():
    assert request_bucket(100, None) == NO_GAP
    assert request_bucket(None, 100) == NO_GAP
    assert request_bucket(100, 90) == request_bucket(100, 100) == 1
    assert request_bucket(100, 103) == gap_bucket(3)
