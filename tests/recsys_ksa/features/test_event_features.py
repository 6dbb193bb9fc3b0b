"""Online tokens equal batch tokens, whatever way a history is cut into arrivals; and both equal a plain reading."""

import datetime
from bisect import bisect_right
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_ksa.config import ModelConfig, parse_config
from recsys_ksa.data.assemble import questions_batch
from recsys_ksa.data.jagged_arrays import offsets_of
from recsys_ksa.errors import ConfigError
from recsys_ksa.features import EventFeatures
from recsys_ksa.features.calendar import ROWS, calendar_rows
from recsys_ksa.features.sessions import LONGEST, NO_PLACE, NUM_SESSION_BUCKETS, session_buckets
from recsys_ksa.features.values import NO_VALUE, value_buckets

GAP = 10
EDGES = (0.0, 1.5, 1.5000000000000002, 40.0)
ALL = EventFeatures(("hour", "weekday"), GAP, EDGES)

values = st.none() | st.sampled_from(EDGES) | st.floats(allow_nan=False)
# Few pauses, so that sessions grow beyond what is counted.
gaps = st.sampled_from([0, 1, GAP] * 12 + [GAP + 1, 90_000, 2**40])
history = st.lists(st.tuples(gaps, values), max_size=80)


def times_of(events: list[tuple[int, Any]], start: int = 3_000_000) -> np.ndarray:
    return start + np.cumsum([gap for gap, _ in events], dtype=np.int64)


def plain(times: list[int], worth: list[float | None]) -> dict[str, list[int]]:
    """The features of one history, as one would say them."""
    found: dict[str, list[int]] = {"hour": [], "weekday": [], "session": [], "value": []}
    place = 0
    for n, (time, value) in enumerate(zip(times, worth)):
        moment = datetime.datetime.fromtimestamp(time, datetime.UTC) if time < 2**36 else None
        found["hour"].append(1 + (moment.hour if moment else time // 3600 % 24))
        found["weekday"].append(1 + (moment.weekday() if moment else (time // 86400 + 3) % 7))
        place = 1 if n == 0 or time - times[n - 1] > GAP else place + 1
        found["session"].append(min(place, LONGEST).bit_length())
        found["value"].append(0 if value is None else 1 + bisect_right(EDGES, value))
    return found


def as_stored(worth: list[float | None]) -> np.ndarray:
    """What a data set has of these values: float32."""
    with np.errstate(over="ignore"):
        return np.array(worth, dtype=np.float64).astype(np.float32).astype(np.float64)


def test_a_value_lies_on_the_same_side_of_an_edge_online_as_in_the_data_set() -> None:
    features = EventFeatures(value_edges=(0.7,))  # as float32 it is less
    columns, _ = features.arrivals(np.array([5]), [0.7], np.array([0, 1]), [None], [NO_PLACE])
    batch, _ = features.columns(np.array([5]), as_stored([0.7]), np.array([0, 1]), np.zeros(1, int), np.zeros(1, int))
    assert columns["value"].tolist() == batch["value"].tolist() == [1]


@given(events=history, data=st.data())
def test_online_tokens_equal_batch_tokens(events: list[tuple[int, float | None]], data: st.DataObject) -> None:
    times, worth = times_of(events), [value for _, value in events]
    offsets = np.array([0, len(times)])
    stored = as_stored(worth)
    batch, _ = ALL.columns(times, stored, offsets, np.zeros(1, np.int64), np.full(1, NO_PLACE))
    assert {name: column.tolist() for name, column in batch.items()} == plain(
        times.tolist(), [None if np.isnan(value) else value for value in stored.tolist()]
    )

    online: dict[str, list[int]] = {name: [] for name in ALL.num_rows}
    at, last, place = 0, None, NO_PLACE
    while at < len(times):
        step = data.draw(st.integers(1, 20))
        part = times[at : at + step], worth[at : at + step], np.array([0, len(times[at : at + step])])
        columns, (place,) = ALL.arrivals(*part, [last], [place])
        for name, column in columns.items():
            online[name] += column.tolist()
        at += step
        last = int(times[min(at, len(times)) - 1])
    assert online == {name: column.tolist() for name, column in batch.items()}


@given(
    users=st.lists(history, min_size=1, max_size=5),
    max_length=st.none() | st.integers(4, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_batch_s_tokens_are_those_of_whole_histories_wherever_its_spans_begin(
    users: list[list[tuple[int, float | None]]], max_length: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.array([len(events) for events in users])
    times = [times_of(events, 1000 * n) for n, events in enumerate(users)]
    worth = [value for events in users for _, value in events]
    data: Any = SimpleNamespace(
        offsets=offsets_of(lengths),
        item_index=np.ones(lengths.sum(), dtype=np.int32),
        timestamp=np.concatenate(times),
        event_type=None,
        value=np.array([np.nan if value is None else value for value in worth], dtype=np.float64),
    )
    cuts = np.array([rng.integers(0, length + 1) for length in lengths])
    batch = questions_batch(
        data, np.arange(len(users)), np.arange(len(users)), cuts, chunk_size=4, max_length=max_length, features=ALL
    )
    for user, events in enumerate(users):
        expected = plain(times[user].tolist(), [value for _, value in events])
        start = int(batch.first_position[user])
        rows = slice(int(batch.offsets[user]), int(batch.offsets[user + 1]))
        for name, column in batch.features.items():
            assert column[rows].tolist() == expected[name][start : cuts[user]]


def test_a_span_inside_a_long_session_counts_from_before_it() -> None:
    lengths = np.arange(LONGEST - 4, LONGEST + 8)
    data: Any = SimpleNamespace(
        offsets=offsets_of(lengths),
        item_index=np.ones(lengths.sum(), dtype=np.int32),
        timestamp=np.arange(lengths.sum()),
        event_type=None,
        value=None,
    )
    users = np.arange(len(lengths))
    batch = questions_batch(
        data, users, users, lengths, chunk_size=2, max_length=3, features=EventFeatures(session_gap=GAP)
    )
    expected = [
        min(place, LONGEST).bit_length()
        for start, length in zip(batch.first_position.tolist(), lengths.tolist())
        for place in range(start + 1, length + 1)
    ]
    assert batch.features["session"].tolist() == expected


def test_every_row_lies_in_its_table() -> None:
    times = np.arange(0, 9 * 86_400, 1_799, dtype=np.int64)
    for name in ("hour", "weekday"):
        assert set(calendar_rows(name, times).tolist()) == set(range(1, ROWS[name]))
    assert set(session_buckets(np.arange(LONGEST + 1)).tolist()) == set(range(NUM_SESSION_BUCKETS))
    reached = value_buckets(np.array([-np.inf, *EDGES, np.inf, np.nan]), EDGES)
    assert set(reached.tolist()) == set(range(ALL.num_rows["value"]))
    assert reached[-1] == NO_VALUE


def test_the_epoch_was_a_thursday_at_midnight() -> None:
    assert calendar_rows("hour", np.array([0, 3_599, 3_600, 86_399])).tolist() == [1, 1, 2, 24]
    assert calendar_rows("weekday", np.array([0, 86_400 * 4, 86_400 * 3])).tolist() == [4, 1, 7]


def test_without_features_there_is_nothing_to_compute() -> None:
    off = EventFeatures.of(ModelConfig())
    assert (off.num_rows, off.events_before) == ({}, 0)
    columns, places = off.arrivals(np.array([5]), None, np.array([0, 1]), [None], [NO_PLACE])
    assert (columns, places.tolist()) == ({}, [NO_PLACE])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value_edges": [1.0, 1.0]}, r"value_edges must ascend, got \[1.0, 1.0\]"),
        ({"calendar": ["hour", "hour"]}, "calendar must name each feature once"),
        ({"calendar": ["month"]}, "calendar.0"),
        ({"session_gap": 0}, "session_gap"),
    ],
)
def test_a_feature_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(ModelConfig, changes, "run.toml")
