import random
import time

import pytest

from ksa_serving.buckets import MOST_OWED_SECONDS, Buckets


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stands = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: stands.now)
    return stands


def test_a_bucket_is_full_at_first_and_fills_again(clock: Clock):
    buckets = Buckets[str](per_second=2, most=5)
    assert [buckets.take("a") for _ in range(5)] == [0] * 5
    assert buckets.take("a") == pytest.approx(0.5)
    assert buckets.take("b", 5) == 0
    clock.now = 0.49
    assert buckets.take("a") == pytest.approx(0.01)
    clock.now = 0.5
    assert buckets.take("a") == 0
    clock.now = 1000.0
    assert [buckets.take("a") > 0 for _ in range(6)] == [False] * 5 + [True]


def test_more_than_a_bucket_holds_is_owed(clock: Clock):
    buckets = Buckets[str](per_second=2, most=5)
    assert buckets.take("a", 9) == 0
    assert buckets.wait("a") == pytest.approx(2)
    assert buckets.take("a", 9) == pytest.approx(4.5)
    clock.now = 2.0
    assert buckets.wait("a") == 0
    assert buckets.wait("a", 5) == pytest.approx(2.5)
    buckets.owe("a", 1e9)
    assert buckets.wait("a") == pytest.approx(MOST_OWED_SECONDS)


def test_as_much_is_taken_as_flows_in_however_it_is_asked_for(seed: int, clock: Clock):
    draw = random.Random(seed)
    buckets = Buckets[str](per_second=3, most=10)
    taken = 0.0
    for _ in range(2000):
        clock.now += draw.random() * 0.2
        amount = draw.uniform(0, 3)
        taken += amount if buckets.take("a", amount) == 0 else 0
        assert taken <= 10 + 3 * clock.now + 1e-6
    assert taken > 0.9 * 3 * clock.now


def test_the_one_untouched_longest_is_forgotten_and_no_more_are_kept():
    buckets = Buckets[int](per_second=1e-9, most=1, keys=3)
    for key in (1, 2, 3):
        assert buckets.take(key) == 0
    buckets.owe(1, 0)
    assert buckets.take(4) == 0
    assert len(buckets) == 3
    assert [buckets.wait(key, 1) > 0 for key in (1, 2, 3, 4)] == [True, False, True, True]
