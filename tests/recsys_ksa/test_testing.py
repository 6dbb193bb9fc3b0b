from collections import Counter

import numpy as np
import pytest

from recsys_ksa.schema import EVENTS
from recsys_ksa.testing import START, lifelong_log


def histories(log) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    for row in log.to_pylist():
        found.setdefault(row["user_id"], []).append((row["timestamp"], row["item_id"]))
    return {user: sorted(events) for user, events in found.items()}


def test_the_same_seed_gives_the_same_log_and_another_seed_another():
    assert lifelong_log(3, 10, 10).equals(lifelong_log(3, 10, 10))
    assert not lifelong_log(3, 10, 10).equals(lifelong_log(4, 10, 10))


@pytest.mark.parametrize("optional", [{}, {"event_types": True}, {"event_ids": True}])
def test_the_columns_are_those_of_the_schema(optional):
    log = lifelong_log(0, 5, 5, **optional)
    expected = ["user_id", "item_id", "timestamp", *(["event_type"] if "event_types" in optional else [])]
    assert log.column_names == expected + (["event_id"] if "event_ids" in optional else [])
    assert all(log.schema.field(name).type == EVENTS.field(name).type for name in log.column_names)
    assert not any(column.null_count for column in log.columns)


def test_every_user_is_there_and_times_lie_within_the_span():
    log = lifelong_log(0, 40, 10, days=100)
    times = log.column("timestamp").to_numpy()
    assert len(histories(log)) == 40
    assert START <= times.min() <= times.max() < START + 100 * 86_400


def test_lengths_are_lognormal_around_the_median_and_capped():
    lengths = [len(events) for events in histories(lifelong_log(1, 400, 10, median_length=30)).values()]
    assert 24 <= np.median(lengths) <= 37
    assert np.mean(lengths) > np.median(lengths)
    assert max(len(events) for events in histories(lifelong_log(1, 50, 10, max_length=20)).values()) == 20


def test_sessions_share_a_time_and_single_events_do_not():
    baskets = lifelong_log(2, 50, 50, events_per_session=5.0)
    times = {(row["user_id"], row["timestamp"]) for row in baskets.to_pylist()}
    assert 3.5 < baskets.num_rows / len(times) < 6.5
    single = lifelong_log(2, 50, 50, events_per_session=1.0)
    assert len({(row["user_id"], row["timestamp"]) for row in single.to_pylist()}) >= 0.99 * single.num_rows


def test_popularity_is_skewed_and_repeats_are_frequent():
    log = lifelong_log(5, 100, 300, repeat_share=0.5)
    counts = sorted(Counter(log.column("item_id").to_pylist()).values(), reverse=True)
    assert sum(counts[:30]) > 0.25 * sum(counts)

    def share_of_repeats(repeat_share: float) -> float:
        found = histories(lifelong_log(5, 100, 300, repeat_share=repeat_share))
        repeats = sum(len(events) - len({item for _, item in events}) for events in found.values())
        return repeats / sum(len(events) for events in found.values())

    assert share_of_repeats(0.6) > share_of_repeats(0.0) + 0.2


def test_the_rhythm_of_day_and_week_is_there():
    times = lifelong_log(6, 300, 50).column("timestamp").to_numpy()
    hours, days = times // 3_600 % 24, (times // 86_400 + 4) % 7  # 1970-01-01 was a Thursday: 0 is Sunday
    assert (hours == 19).sum() > 3 * (hours == 3).sum()
    assert (days == 0).sum() > 1.2 * (days == 2).sum()


def test_event_ids_are_unique_and_sort_by_time():
    rows = lifelong_log(7, 20, 20, event_ids=True).to_pylist()
    ordered = sorted(rows, key=lambda row: row["event_id"])
    times = [row["timestamp"] for row in ordered]
    assert times == sorted(times)
    assert len({row["event_id"] for row in rows}) == len(rows)
