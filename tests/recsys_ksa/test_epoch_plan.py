"""Every user once an epoch, in random order, within the budget, evenly over ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_ksa.data.epoch_plan import POOL_BLOCKS, WINDOW_STEPS, drawn_lengths, pack, pack_for_ranks, shuffled
from recsys_ksa.data.jagged_arrays import lowest_within
from recsys_ksa.errors import DataError


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_pack_lets_a_long_user_stand_alone() -> None:
    runs = pack(np.arange(5), np.array([3, 20, 4, 6, 1]), 10)
    assert [run.tolist() for run in runs] == [[0], [1], [2, 3], [4]]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=400),
    world_size=st.integers(1, 5),
    budget=st.integers(1, 2_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_ranks_share_the_users_of_every_step(lengths: list[int], world_size: int, budget: int, seed: int) -> None:
    users, held = generator(seed).permutation(len(lengths)) + 7, np.array(lengths)
    if len(lengths) < world_size:
        with pytest.raises(DataError, match="expected a user a rank"):
            pack_for_ranks(users, held, budget, world_size, generator(seed))
        return
    steps = pack_for_ranks(users, held, budget, world_size, generator(seed))
    assert sorted(np.concatenate([batch for step in steps for batch in step]).tolist()) == sorted(users.tolist())
    length_of = dict(zip(users.tolist(), lengths))
    for step in steps:
        assert len(step) == world_size
        assert all(len(batch) for batch in step)
    over = [batch for step in steps for batch in step if sum(length_of[user] for user in batch) > budget]
    if len(lengths) >= 20 * world_size and max(lengths) * 4 <= budget:
        assert not over  # with few or long users a rank's share of the last step may not fit
    again = pack_for_ranks(users, held, budget, world_size, generator(seed))
    assert all(np.array_equal(a, b) for one, two in zip(steps, again, strict=True) for a, b in zip(one, two))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("world_size", [2, 8])
def test_lognormal_histories_are_even_over_ranks_within_three_percent(world_size: int, few: bool, seed: int) -> None:
    """Also where the last users would fill no step of their own."""
    lengths = np.clip(generator(seed).lognormal(np.log(200), 1.2, 20_000), 1, 4_096).astype(np.int64)
    if few:
        windows = 2 * 8_192 * world_size * WINDOW_STEPS
        lengths = lengths[: int(np.searchsorted(lengths.cumsum(), windows)) + 2 * world_size]
    steps = pack_for_ranks(np.arange(len(lengths)), lengths, 8_192, world_size, generator(seed))
    tokens = np.array([[lengths[batch].sum() for batch in step] for step in steps])
    spread = (tokens.max(axis=1) - tokens.min(axis=1)) / tokens.max(axis=1)
    assert spread.max() <= 0.03
    assert tokens.max() <= 8_192
    # Neither are the steps in order of their tokens.
    assert np.any(np.diff(tokens.sum(axis=1)[:16]) < 0)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300),
    pool=st.none() | st.integers(1, 4_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_shuffle_holds_every_user_once(lengths: list[int], pool: int | None, seed: int) -> None:
    users = np.arange(len(lengths)) * 3
    order = shuffled(users, np.array(lengths), generator(seed), pool)
    assert sorted(order.tolist()) == users.tolist()


def test_a_pool_reads_few_blocks_of_neighbours(seed: int) -> None:
    users, lengths = np.arange(64_000), np.full(64_000, 10)
    order = shuffled(users, lengths, generator(seed), 40_000)
    in_pool = order[:4_000]
    gaps = np.diff(np.sort(in_pool)) > 1
    assert gaps.sum() < POOL_BLOCKS
    assert not np.array_equal(in_pool, np.sort(in_pool))
    other = shuffled(users, lengths, generator(seed + 1), 40_000)[:4_000]
    assert set(in_pool.tolist()) != set(other.tolist())


def test_short_histories_are_always_read_whole_and_long_ones_as_hstu_says(seed: int) -> None:
    longest, alpha = 4_096, 1.6
    short = int(longest ** (alpha / 2))
    lengths = np.repeat([1, short, 2 * short, longest], 20_000)
    drawn = drawn_lengths(lengths, longest, alpha, generator(seed))
    assert np.array_equal(drawn[:40_000], lengths[:40_000])
    for rows, length in ((slice(40_000, 60_000), 2 * short), (slice(60_000, 80_000), longest)):
        assert set(np.unique(drawn[rows]).tolist()) == {short, length}
        expected = longest**alpha / length**2
        # Five standard deviations of a share of 20,000 draws.
        assert np.mean(drawn[rows] == length) == pytest.approx(expected, abs=5 * np.sqrt(expected / 20_000))
    assert np.array_equal(drawn_lengths(lengths, longest, 2.0, generator(seed)), lengths)


@given(sizes=st.lists(st.integers(0, 40), max_size=20), count=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_the_lowest_are_those_a_sort_puts_first(sizes: list[int], count: int, seed: int) -> None:
    owner = np.repeat(np.arange(len(sizes)), np.array(sizes, dtype=np.int64))
    key = generator(seed).random(len(owner))
    lower = (owner[:, None] == owner) & (key[:, None] > key)
    assert np.array_equal(lowest_within(owner, key, count), lower.sum(1) < count)
