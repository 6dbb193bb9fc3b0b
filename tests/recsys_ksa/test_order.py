import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_ksa.order import hash_tie_numbers, item_hash, number_tie, order_key, splitmix64

MASK = 2**64 - 1


def slow_splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix64_gives_the_generators_published_first_output():
    # Seed 0 of the reference generator, whose first step adds the golden gamma.
    assert int(splitmix64(np.array([0], dtype=np.uint64))[0]) == 0xE220A8397B1DCDAF


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=20))
def test_splitmix64_equals_integer_arithmetic(values):
    with np.errstate(over="ignore"):
        found = splitmix64(np.array(values, dtype=np.uint64)).tolist()
    assert found == [slow_splitmix64(value) for value in values]


@given(st.integers(0, 2**62), st.text())
def test_a_hash_tie_is_splitmix64_of_time_xor_item_hash_then_the_type(timestamp, item):
    hashed = int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "big")
    expected = slow_splitmix64(timestamp ^ hashed).to_bytes(8, "big")
    assert item_hash(item) == hashed
    key = order_key("hash", timestamp, item, event_id="ignored", event_type="buy", arrival=1)
    assert key == (timestamp, expected + b"buy")
    plain = order_key("hash", timestamp, item, event_id=None, event_type=None, arrival=2)
    assert plain == (timestamp, expected)


@given(st.integers(-(2**63), 2**63 - 1), st.text())
def test_one_tie_is_that_of_arrays(timestamp, item):
    with np.errstate(over="ignore"):
        (number,) = hash_tie_numbers(np.array([timestamp]), np.array([item_hash(item)], dtype=np.uint64))
    key = order_key("hash", timestamp, item, event_id=None, event_type=None, arrival=0)
    assert key == (timestamp, number_tie(int(number)))


@given(st.integers(0, MASK), st.integers(0, MASK))
def test_number_ties_compare_as_numbers(first, second):
    assert (number_tie(first) < number_tie(second)) == (first < second)


def test_the_three_kinds_of_tie():
    event = {"event_id": "e-1", "event_type": "buy", "arrival": 258}
    assert order_key("id", 7, "x", **event) == (7, b"e-1")
    assert order_key("arrival", 7, "x", **event) == (7, b"\x00\x00\x00\x00\x00\x00\x01\x02")
    assert order_key("id", 7, "x", **(event | {"event_id": None})) == (7, b"\x00\x00\x00\x00\x00\x00\x01\x02")


def test_ids_compare_as_bytes_not_as_text_of_a_language():
    keys = [order_key("id", 7, "x", event_id=event, event_type=None, arrival=0) for event in ("é", "z", "Z", "10", "9")]
    assert [tie.decode() for _, tie in sorted(keys)] == ["10", "9", "Z", "z", "é"]


def test_hash_order_differs_from_time_to_time():
    items = [f"i{n}" for n in range(8)]
    hashes = np.array([item_hash(item) for item in items], dtype=np.uint64)
    with np.errstate(over="ignore"):
        orders = {tuple(np.argsort(hash_tie_numbers(np.full(8, time), hashes)).tolist()) for time in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("kind", ["id", "arrival", "hash"])
def test_an_earlier_time_always_comes_first(kind):
    early = order_key(kind, 6, "z", event_id="z", event_type="z", arrival=9)
    late = order_key(kind, 7, "a", event_id="a", event_type="a", arrival=1)
    assert early < late
