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


def test_a_resample_is_that_of_users_drawn_one_by_one(rng):
    """Means of whole resamples, users without a value left out of theirs: against a loop over the same draws."""
    values = rng.random((17, 4))
    values[rng.random((17, 4)) < 0.2] = np.nan
    values[:, 3] = np.nan
    values[2, 3] = 0.5
    seed = int(rng.integers(1 << 30))
    found = Bootstrap(values, resamples=50, seed=seed)
    drawn = np.random.default_rng(seed).integers(0, 17, size=(50, 17))
    for column in range(4):
        means = []
        for users in drawn:
            kept = [values[user, column] for user in users if not np.isnan(values[user, column])]
            means.append(np.mean(kept) if kept else np.nan)
        np.testing.assert_allclose(found.resampled[:, column], means)
        low, high = np.nanquantile(means, [0.025, 0.975])
        interval = found.interval(column)
        np.testing.assert_allclose([interval.low, interval.high], [low, high])
