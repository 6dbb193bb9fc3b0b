"""Popularity as of a time: what came on the days before it, and nothing else."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recsys_ksa.config import ModelConfig
from recsys_ksa.data.jagged_arrays import offsets_of
from recsys_ksa.data.popularity import DAY, DayCounts
from recsys_ksa.errors import ConfigError, DataError
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.network import Network
from recsys_ksa.model.popularity import SMOOTHING, WINDOWS, Centre, Popularity, PopularityBias, add_popularity, day_of

ITEMS = 9


def histories(rng: np.random.Generator, days: int = 40) -> SimpleNamespace:
    lengths = rng.integers(0, 30, 12)
    total = int(lengths.sum())
    start = int(rng.integers(-3, 20_000)) * DAY
    return SimpleNamespace(
        offsets=offsets_of(lengths),
        lengths=lengths,
        num_users=len(lengths),
        num_events=total,
        item_index=rng.integers(0, ITEMS, total).astype(np.int32),
        timestamp=start + np.concatenate([np.sort(rng.integers(0, days * DAY, n)) for n in lengths]),
    )


def as_of(data: SimpleNamespace, times: np.ndarray, end: np.ndarray | None = None) -> torch.Tensor:
    popularity = Popularity(DayCounts.of_histories(data, end), ITEMS)  # pyright: ignore[reportArgumentType]
    days = day_of(torch.from_numpy(times))
    return torch.stack([popularity.log_shares(day) for day in days])


def plain_log_shares(data: SimpleNamespace, time: int) -> np.ndarray:
    """Return [I, F] by reading every event."""
    midnight = time // DAY * DAY
    columns = []
    for window in WINDOWS:
        for first_only in (False, True):
            count = np.zeros(ITEMS)
            for user in range(data.num_users):
                met = set()
                for row in range(data.offsets[user], data.offsets[user + 1]):
                    item, at = int(data.item_index[row]), int(data.timestamp[row])
                    fresh = item not in met
                    met.add(item)
                    inside = midnight - window * DAY <= at < midnight
                    count[item] += item > 0 and inside and (fresh or not first_only)
            columns.append(np.log((count + SMOOTHING) / (count.sum() / ITEMS + SMOOTHING)))
    return np.stack(columns, axis=1)


def test_log_shares_are_a_plain_count_of_the_days_before(rng: np.random.Generator) -> None:
    data = histories(rng)
    low, high = data.timestamp.min() - 9 * DAY, data.timestamp.max() + 9 * DAY
    times = rng.integers(low, high, 12)
    for time, found in zip(times, as_of(data, times)):
        np.testing.assert_allclose(found.numpy(), plain_log_shares(data, int(time)), rtol=1e-5, atol=1e-5)


def test_an_event_of_that_time_or_later_never_changes_popularity(rng: np.random.Generator) -> None:
    data = histories(rng)
    times = np.append(rng.choice(data.timestamp, 10), rng.integers(data.timestamp.min(), data.timestamp.max(), 10))
    before = as_of(data, times)
    for time, expected in zip(times, before):
        changed = SimpleNamespace(**vars(data))
        later = data.timestamp >= time
        changed.item_index = np.where(later, rng.integers(0, ITEMS, data.num_events), data.item_index)
        changed.timestamp = np.where(later, data.timestamp + rng.integers(0, 20 * DAY), data.timestamp)
        assert torch.equal(as_of(changed, np.array([time]))[0], expected)


def test_events_outside_the_span_are_never_counted(rng: np.random.Generator) -> None:
    data = histories(rng)
    end = rng.integers(0, data.lengths + 1)
    held_out = np.arange(data.num_events) - np.repeat(data.offsets[:-1], data.lengths) >= np.repeat(end, data.lengths)
    changed = SimpleNamespace(**vars(data))
    changed.item_index = np.where(held_out, rng.integers(0, ITEMS, data.num_events), data.item_index)
    times = rng.integers(data.timestamp.min(), data.timestamp.max() + 9 * DAY, 10)
    assert torch.equal(as_of(data, times, end), as_of(changed, times, end))


def test_shares_of_pairs_are_rows_of_the_whole(rng: np.random.Generator) -> None:
    data = histories(rng)
    popularity = Popularity(DayCounts.of_histories(data), ITEMS)  # pyright: ignore[reportArgumentType]
    day = day_of(torch.from_numpy(rng.choice(data.timestamp, 6)))
    item = torch.from_numpy(rng.integers(0, ITEMS, 4))
    whole = torch.stack([popularity.log_shares(one) for one in day])
    assert torch.equal(popularity.log_shares(day[:, None], item), whole[:, item])
    assert torch.equal(popularity.log_shares(day[:4], item), whole[torch.arange(4), item])


def test_an_untrained_bias_ranks_like_the_last_7_days(rng: np.random.Generator) -> None:
    data = histories(rng)
    midnight = (int(data.timestamp.max()) - 3 * DAY) // DAY * DAY
    inside = (data.timestamp < midnight) & (data.timestamp >= midnight - 7 * DAY) & (data.item_index > 0)
    count = np.bincount(data.item_index[inside], minlength=ITEMS)
    bias = PopularityBias(ITEMS)(as_of(data, np.array([midnight]))[0]).detach().numpy()
    assert np.all(np.sign(np.diff(bias[np.argsort(count, kind="stable")])) >= 0)
    assert np.array_equal(count[:, None] > count, bias[:, None] - bias > 1e-5)


def test_scores_gain_popularity_a_day_at_a_time_and_own_pairs_do_not(rng: np.random.Generator) -> None:
    data = histories(rng)
    popularity = Popularity(DayCounts.of_histories(data), ITEMS)  # pyright: ignore[reportArgumentType]
    bias = PopularityBias(ITEMS).requires_grad_(False)
    bias.weight.normal_()
    time = torch.from_numpy(rng.choice(data.timestamp, 7))
    scores = torch.randn(7, ITEMS)
    gained = scores.clone()
    own = torch.tensor([0, 0, 5]), torch.tensor([1, 4, 2])
    add_popularity(gained, bias, popularity, time, own)
    expected = scores + torch.stack([bias(popularity.log_shares(day)) for day in day_of(time)])
    expected[own] = scores[own]
    assert torch.equal(gained, expected)


def test_counts_are_kept_in_a_file_and_renumbered(rng: np.random.Generator, tmp_path: Path) -> None:
    data = histories(rng)
    counts = DayCounts.of_histories(data)  # pyright: ignore[reportArgumentType]
    counts.save(tmp_path / "counts.parquet")
    again = DayCounts.load(tmp_path / "counts.parquet")
    assert again.last_time == data.timestamp[data.item_index > 0].max()
    to = np.append(0, rng.permutation(ITEMS - 1) + 1)
    to[3] = 0
    data.item_index = to[data.item_index]
    expected = Popularity(DayCounts.of_histories(data), ITEMS)  # pyright: ignore[reportArgumentType]
    found = Popularity(again.renumbered(to), ITEMS)
    assert found.first_day == expected.first_day
    assert torch.equal(found.table, expected.table)
    (tmp_path / "counts.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="expected counts of items by day"):
        DayCounts.load(tmp_path / "counts.parquet")


def test_a_time_the_counts_do_not_reach_is_refused(rng: np.random.Generator) -> None:
    data = histories(rng)
    counts = DayCounts.of_histories(data)  # pyright: ignore[reportArgumentType]
    counts.check_time(counts.last_time + 7 * DAY)
    for time in (int(counts.day.min()) * DAY, counts.last_time + 9 * DAY):
        with pytest.raises(DataError, match=r"expected events on the 7 whole days before it, got none\. Name a time"):
            counts.check_time(time)


def test_an_ordinal_clock_is_refused() -> None:
    config = ModelConfig(item_bias="popularity-7d", use_gap=False, use_request_time=False)
    with pytest.raises(ConfigError, match=r"model\.item_bias: expected none or learned on an ordinal clock"):
        Network(config, FeatureSchema(5, clock="ordinal"))


def test_users_vectors_lose_what_they_have_in_common() -> None:
    centre = Centre(6)
    common, own = torch.randn(6), torch.randn(2000, 6)
    for _ in range(400):
        centre(common + own)
    found = centre.eval()(common + own)
    torch.testing.assert_close(found, own - own.mean(0), rtol=1e-3, atol=1e-2)
    before = centre.mean.clone()
    centre(own)
    assert torch.equal(centre.mean, before)
