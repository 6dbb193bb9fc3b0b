import sys

import numpy as np
import pytest

from recsys_ksa.errors import MissingPackageError
from recsys_ksa.evaluate import baselines as module
from recsys_ksa.evaluate.baselines import (
    WEEK,
    DecayedFrequency,
    ItemItem,
    PersonalFrequency,
    Popularity,
    RepeatLast,
    baselines,
    choose_half_life,
)
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import ask, held_out_start

ITEMS = 12
DAY = 86_400
PROTOCOLS = ["loo", "loo-classic", "global"]


def counted_events(histories, protocol, time) -> list[tuple[int, int]]:
    """(item, time) of the events that popularity may count."""
    held_out = held_out_start(histories, protocol)
    found = []
    for user in range(histories.num_users):
        base = int(histories.offsets[user])
        for at in range(histories.length(user)):
            event = int(histories.item_index[base + at]), int(histories.timestamp[base + at])
            if (event[1] < time) if protocol == "global" else at < held_out[user]:
                found.append(event)
    return found


def known_events(histories, questions, q) -> list[tuple[int, int]]:
    base = int(histories.offsets[questions.user[q]])
    rows = slice(base, base + int(questions.cut[q]))
    return list(zip(histories.item_index[rows].tolist(), histories.timestamp[rows].tolist()))


def naive_popularity(events, window=None) -> list[float]:
    if window is not None and events:
        last = max(time for _, time in events)
        events = [event for event in events if event[1] > last - window]
    return [float(sum(item == index for item, _ in events)) for index in range(ITEMS + 1)]


def same_order(scores: list[float], keys: list[tuple]) -> bool:
    """Whether two scorings agree on every pair of items, ties among them."""
    items = range(1, ITEMS + 1)
    compare = lambda values: [(values[a] > values[b]) - (values[a] < values[b]) for a in items for b in items]  # noqa: E731
    return compare(scores) == compare(keys)


@pytest.mark.parametrize("window", [None, WEEK])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_popularity_equals_a_slow_count(protocol, window, rng, random_histories):
    histories = random_histories(rng)
    questions = ask(histories, protocol)
    scores = Popularity("popularity", histories, ITEMS, protocol, window).scores(questions).tolist()
    for q in range(len(questions)):
        events = counted_events(histories, protocol, int(questions.timestamp[q]))
        assert scores[q] == naive_popularity(events, window)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_personal_baselines_order_own_items_first_then_by_popularity(protocol, rng, random_histories):
    histories = random_histories(rng)
    questions = ask(histories, protocol)
    ownership = Ownership(histories)
    popularity = Popularity("popularity", histories, ITEMS, protocol, None)
    half_life = 5.0 * DAY
    frequency = PersonalFrequency(ownership, popularity).scores(questions).tolist()
    decayed = DecayedFrequency(ownership, popularity, half_life).scores(questions).tolist()
    latest = RepeatLast(ownership, popularity).scores(questions).tolist()
    for q in range(len(questions)):
        events = known_events(histories, questions, q)
        popular = naive_popularity(counted_events(histories, protocol, int(questions.timestamp[q])))
        now = events[-1][1] if events else 0
        counts, sums, last = {}, {}, {}
        for at, (item, time) in enumerate(events):
            counts[item] = counts.get(item, 0) + 1
            sums[item] = sums.get(item, 0.0) + 2.0 ** ((time - now) / half_life)
            last[item] = at if protocol == "loo-classic" else time
        keyed = [[(own.get(item, -1), popular[item]) for item in range(ITEMS + 1)] for own in (counts, last)]
        assert same_order(frequency[q], keyed[0])
        assert same_order(latest[q], keyed[1])
        logs = {item: round(float(np.log2(total)), 10) for item, total in sums.items()}
        assert same_order(decayed[q], [(logs.get(item, -np.inf), popular[item]) for item in range(ITEMS + 1)])


def test_equal_decayed_counts_are_ordered_by_popularity(make_histories):
    """Two events a half-life before one: 2 * 2 ** -2.7 and 2 ** -1.7, whose logarithms floats tell apart."""
    user = [(1, 15 * DAY), (1, 15 * DAY), (2, 20 * DAY), (3, 28 * DAY + DAY // 2), (4, 40 * DAY)]
    histories = make_histories([user])
    popularity = Popularity("popularity", histories, ITEMS, "loo", None)
    (scores,) = DecayedFrequency(Ownership(histories), popularity, 5.0 * DAY).scores(ask(histories, "loo"))
    assert scores[1] > scores[2]


def test_item_item_is_the_cosine_of_who_had_what(rng, random_histories):
    histories = random_histories(rng)
    questions = ask(histories, "loo")
    popularity = Popularity("popularity", histories, ITEMS, "loo", None)
    scores = ItemItem(Ownership(histories), popularity, histories, "loo").scores(questions).numpy()
    held_out = held_out_start(histories, "loo")
    had = np.zeros((histories.num_users, ITEMS + 1))
    for user in range(histories.num_users):
        base = int(histories.offsets[user])
        had[user, histories.item_index[base : base + int(held_out[user])]] = 1.0
    norm = np.maximum(np.linalg.norm(had, axis=0), 1e-12)
    cosine = had.T @ had / np.outer(norm, norm)
    for q in range(len(questions)):
        own = {item for item, _ in known_events(histories, questions, q)}
        expected = cosine[sorted(own)].sum(axis=0)
        found = np.where(scores[q] > 0, scores[q], 0.0)
        assert found[1:] == pytest.approx(expected[1:], rel=1e-4, abs=1e-5)
        assert np.all(scores[q] >= -1.0)


def test_the_half_life_is_the_best_on_validation(make_histories, make_dataset, monkeypatch):
    # Item 1 was bought often long ago, item 2 a few times of late; validation and test want item 2.
    # Without popularity's help: as many users of another kind hold item 1 up.
    user = [(1, day * DAY) for day in range(20)] + [(2, day * DAY) for day in (200, 201, 202, 203, 204, 205)]
    dataset = make_dataset(make_histories([[(item, time + shift) for item, time in user] for shift in range(8)]), 40)
    ownership = Ownership(dataset.histories)
    popularity = Popularity("popularity", dataset.histories, 40, "loo", None)
    monkeypatch.setattr(module, "HALF_LIVES", (10_000 * DAY, 7 * DAY))
    assert choose_half_life(dataset, "loo", ownership, popularity, exclude_seen=False) == 7 * DAY


def test_an_ordinal_clock_leaves_out_seven_days_by_name(rng, random_histories, make_dataset):
    dataset = make_dataset(random_histories(rng), clock="ordinal")
    scorers, notes = baselines(dataset, "loo", Ownership(dataset.histories), exclude_seen=False)
    assert "popularity-7d" not in {scorer.name for scorer in scorers}
    assert "ordinal" in notes["popularity-7d"]
    assert "events" in notes["personal-frequency-decayed"]


def test_item_item_without_its_package_says_what_to_do(rng, random_histories, make_dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "implicit.nearest_neighbours", None)
    dataset = make_dataset(random_histories(rng))
    with pytest.raises(MissingPackageError, match="implicit"):
        baselines(dataset, "loo", Ownership(dataset.histories), exclude_seen=False, names=["item-item"])
