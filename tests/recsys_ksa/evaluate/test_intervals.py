import numpy as np

from recsys_ksa.evaluate.intervals import Bootstrap


def test_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(2.0, 1.0, size=(400, 1))
    found = Bootstrap(values, resamples=4000).interval(0)
    reach = 1.96 * values.std() / 20
    assert found.value == values.mean()
    assert abs(found.low - (values.mean() - reach)) < 0.015
    assert abs(found.high - (values.mean() + reach)) < 0.015
    assert found.num_users == 400


def test_a_difference_is_paired_by_user():
    base = np.random.default_rng(0).normal(size=100)
    found = Bootstrap(np.stack([base + 0.1, base], axis=1)).difference(0, 1)
    assert np.allclose([found.value, found.low, found.high], 0.1)


def test_users_without_a_value_are_left_out():
    values = np.array([[1.0, np.nan], [3.0, 5.0], [np.nan, np.nan]])
    bootstrap = Bootstrap(values)
    assert bootstrap.interval(0).value == 2.0
    assert bootstrap.interval(0).num_users == 2
    one = bootstrap.interval(1)
    assert (one.value, one.low, one.high, one.num_users) == (5.0, 5.0, 5.0, 1)


def test_the_same_values_give_the_same_interval():
    values = np.random.default_rng(1).random((50, 3))
    assert Bootstrap(values).interval(2) == Bootstrap(values).interval(2)
