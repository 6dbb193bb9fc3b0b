"""Bootstrap over users: means, their intervals, intervals of paired differences; paired tests. Numpy, seeded.

U users, C columns (one a model, slice and metric), B resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
FLIPS = 10_000
"""Draws of a sign-flip test."""
COVERAGE = 0.95
SEED = 20_240_424
_DRAWN = 1 << 22
"""Most draws held at once."""


@dataclass(frozen=True)
class Interval:
    """A mean over users with its 95% percentile interval."""

    value: float
    low: float
    high: float
    num_users: int


class Bootstrap:
    """One set of resamples for all columns, so that differences are paired by user."""

    def __init__(self, values: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        """Resample users.

        Args:
            values: float64 [U, C], NaN where a user has no value in a column.
            resamples: B.
            seed: of the draws.
        """
        present = ~np.isnan(values)
        filled = np.where(present, values, 0.0)
        self.num_users = present.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.means = filled.sum(axis=0) / self.num_users
            self.resampled = _resampled_means(filled, present, resamples, seed)

    def interval(self, column: int) -> Interval:
        """Return a column's mean and interval."""
        return self._interval(self.means[column], self.resampled[:, column], self.num_users[column])

    def difference(self, column: int, other: int) -> Interval:
        """Return the mean of column minus other over users, and its interval; both have the same users."""
        assert self.num_users[column] == self.num_users[other]
        return self._interval(
            self.means[column] - self.means[other],
            self.resampled[:, column] - self.resampled[:, other],
            self.num_users[column],
        )

    @staticmethod
    def _interval(value: float, resampled: NDArray[np.float64], num_users: int) -> Interval:
        # A slice of few users can be missing from a resample altogether.
        drawn = resampled[~np.isnan(resampled)]
        tail = (1.0 - COVERAGE) / 2.0
        low, high = np.quantile(drawn, [tail, 1.0 - tail]) if len(drawn) else (value, value)
        return Interval(float(value), float(low), float(high), int(num_users))


def _resampled_means(
    filled: NDArray[np.float64], present: NDArray[np.bool_], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return the means of B resamples of users, float64 [B, C]; NaN where a resample has no user of a column."""
    num_users = len(filled)
    # Columns of one slice share their users: count each distinct pattern once.
    patterns, pattern = np.unique(present, axis=1, return_inverse=True)
    patterns = patterns.astype(np.float64)
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWN // max(num_users, 1))
    means = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(0, num_users, size=(size, num_users)) + np.arange(size)[:, None] * num_users
        weight = np.bincount(drawn.ravel(), minlength=size * num_users).reshape(size, num_users).astype(np.float64)
        counts = (weight @ patterns)[:, pattern.ravel()]
        means.append(weight @ filled / counts)
    return np.concatenate(means)


def sign_flip_p(differences: NDArray[np.float64], *, draws: int = FLIPS, seed: int = SEED) -> NDArray[np.float64]:
    """Return the two-sided p-value of each mean difference: users' differences take random signs. float64 [P].

    If two models are equally good, a user's difference is as likely with the other sign. The observed signs count as
    one draw, so no p is below 1 / (draws + 1).

    Args:
        differences: float64 [U, P], paired by user.
        draws: of the signs of all users.
        seed: of the draws.
    """
    num_users = len(differences)
    observed = np.abs(differences.sum(axis=0))
    # Sums of the same numbers in another order may differ in the last digits: those count as equal.
    observed -= 1e-12 * np.abs(differences).sum(axis=0)
    rng = np.random.default_rng(seed)
    reached = np.zeros(differences.shape[1])
    step = max(1, _DRAWN // max(num_users, 1))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        signs = rng.integers(0, 2, size=(size, num_users), dtype=np.int8).astype(np.float64) * 2.0 - 1.0
        reached += (np.abs(signs @ differences) >= observed).sum(axis=0)
    return (1.0 + reached) / (1.0 + draws)


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Holm's step-down corrected p-values: among all tests, a false alarm at level a has probability <= a."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return corrected
