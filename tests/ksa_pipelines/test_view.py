from collections import Counter

import numpy as np
import pytest

from ksa_pipelines.bots import BotRule, find_bots
from ksa_pipelines.caps import capped_since
from ksa_pipelines.view import Limits, view
from recsys_ksa.cli import main
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.errors import DataError
from recsys_ksa.testing import item_table, lifelong_log, prepared_dataset


def said(line: str) -> None:
    """Takes a step's line and drops it."""


def slow_core(pairs: list[tuple], least: int) -> list[tuple]:
    while True:
        items, users = Counter(item for _, item, _ in pairs), Counter(user for user, *_ in pairs)
        kept = [pair for pair in pairs if items[pair[1]] >= least and users[pair[0]] >= least]
        if len(kept) == len(pairs):
            return kept
        pairs = kept


def events_of(dataset) -> list[tuple]:
    histories = dataset.histories
    users = np.repeat(histories.user_ids(), histories.lengths)
    items = [dataset.items.item_id[index] for index in histories.item_index]
    return sorted(zip(users.tolist(), items, histories.timestamp.tolist()))


@pytest.fixture
def whole(tmp_path, seed):
    log = lifelong_log(seed % 1000, 40, 60, median_length=8, event_types=True, events_per_session=1.0)
    return prepared_dataset(tmp_path, log, items=item_table(60), arguments=["--num-buckets", "3"])


def test_a_core_is_what_dropping_in_turns_leaves(whole, tmp_path):
    expected = slow_core(events_of(whole), 5)

    view(whole.path, tmp_path / "view", Limits(k_core=5), said)
    code = main(["prepare", str(tmp_path / "log.parquet"), "--out", str(tmp_path / "core"), "--k-core", "5"])

    assert code == 0
    for name in ("view", "core"):
        assert events_of(open_dataset(tmp_path / name)) == sorted(expected)


def test_a_view_keeps_order_features_and_tie(whole, tmp_path):
    view(whole.path, tmp_path / "view", Limits(), said)
    copy = open_dataset(tmp_path / "view")
    assert copy.manifest.tie == whole.manifest.tie
    assert copy.items.item_id == whole.items.item_id
    assert copy.items.title == whole.items.title
    assert copy.vocab == whole.vocab
    assert np.array_equal(copy.histories.item_index, whole.histories.item_index)
    assert np.array_equal(copy.histories.event_type, whole.histories.event_type)
    assert all(np.array_equal(column, whole.histories.split[name]) for name, column in copy.histories.split.items())


def test_a_cap_keeps_the_newest_events(whole, tmp_path):
    view(whole.path, tmp_path / "view", Limits(max_user_events=3), said)
    capped = open_dataset(tmp_path / "view").histories
    for number, user in enumerate(capped.user_ids()):
        rows = whole.histories.rows(whole.histories.user_ids().index(user))
        assert capped.timestamp[capped.rows(number)].tolist() == whole.histories.timestamp[rows][-3:].tolist()


def test_an_item_cap_keeps_the_newest_events_of_each_item(whole, tmp_path):
    view(whole.path, tmp_path / "view", Limits(max_item_events=4), said)
    times: dict[str, list[int]] = {}
    for _, item, timestamp in events_of(whole):
        times.setdefault(item, []).append(timestamp)
    # Events of one second stay or go together.
    since = {
        item: min((t for t in each if sum(o >= t for o in each) <= 4), default=None) for item, each in times.items()
    }
    expected = [event for event in events_of(whole) if since[event[1]] is not None and event[2] >= since[event[1]]]
    assert events_of(open_dataset(tmp_path / "view")) == expected
    assert len(expected) < len(events_of(whole))


def test_the_time_from_which_an_item_is_kept_is_found_by_halving(rng, monkeypatch):
    monkeypatch.setattr("ksa_pipelines.caps.BLOCK", 7)
    for _ in range(50):
        num_events, most = int(rng.integers(1, 40)), int(rng.integers(1, 6))
        item = rng.integers(0, 5, num_events).astype(np.int32)
        timestamp = rng.integers(0, [4, 10**9][int(rng.integers(2))], num_events)
        since = capped_since(item, timestamp, 6, most)
        for index in range(6):
            times = timestamp[item == index]
            kept = times[times >= since[index]]
            assert len(kept) <= most
            left = np.setdiff1d(times, kept)
            assert len(left) == 0 or (times >= left.max()).sum() > most


def test_a_core_of_nothing_is_refused(whole, tmp_path):
    with pytest.raises(DataError, match=r"outside the 10000-core. Ask for less") as refused:
        view(whole.path, tmp_path / "view", Limits(k_core=10_000), said)
    assert str(refused.value).startswith(f"{whole.path}: ")  # and not a file of the way there, which is gone
    assert not (tmp_path / "view").exists()


@pytest.mark.parametrize("limit", ["--k-core=-1", "--max-user-events=0", "--max-item-events=0"])
def test_a_limit_below_its_least_is_refused(whole, tmp_path, capsys, limit):
    assert main(["view", str(whole.path), "--out", str(tmp_path / "view"), limit]) == 2
    assert f"{limit.partition('=')[0]}: expected at least" in capsys.readouterr().err


def test_a_view_that_is_there_is_refused_before_any_event_is_read(whole, tmp_path):
    lines: list[str] = []
    with pytest.raises(DataError, match="does not exist yet"):
        view(whole.path, tmp_path, Limits(), lines.append)
    assert not lines


def test_bots_are_found_by_rate_and_by_repetition():
    rule = BotRule(max_events_per_day=10, min_events=20, max_item_share=0.5)
    day = 86_400
    calm, fast = np.arange(19) * day, np.arange(11)
    stubborn_items = np.repeat([7, 1], [15, 5])
    timestamp = np.concatenate([calm, fast, np.arange(20) * day, np.arange(20) * day])
    item = np.concatenate([np.zeros(19), np.arange(11), stubborn_items, np.arange(20)]).astype(np.int32)
    offsets = np.cumsum([0, 19, 11, 20, 20])
    assert find_bots(item, timestamp, offsets, rule).tolist() == [False, True, True, False]


def test_bots_stay_out_of_a_view_that_drops_them(prepared, tmp_path):
    log = {
        "user_id": ["bot"] * 30 + ["anna"] * 2,
        "item_id": [f"i{n}" for n in range(30)] + ["i1", "i2"],
        "timestamp": [*range(30), 5, 6],
    }
    dataset = prepared(log)
    view(dataset.path, tmp_path / "view", Limits(bots=BotRule(max_events_per_day=20)), said)
    assert open_dataset(tmp_path / "view").histories.user_ids() == ["anna"]
