import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksa_pipelines.arrow import encode
from ksa_pipelines.names import audit_ranks
from ksa_pipelines.ties import TiedPairs, count_tied_pairs, order_by_time, sort_by_order
from recsys_ksa.data.manifest import TieAudit
from recsys_ksa.errors import SchemaError
from recsys_ksa.order import item_hash, order_key
from recsys_ksa.testing import lifelong_log

EVENT = st.fixed_dictionaries(
    {
        "user": st.integers(0, 2),
        "item_id": st.sampled_from(["x", "y", "é", "10", "9"]),
        "timestamp": st.integers(0, 2) | st.integers(0, 2**40),
        "event_type_name": st.sampled_from([None, "", "buy", "view"]),
        "event_id": st.sampled_from([None, "a", "B", "é", "aa"]) | st.text(max_size=9),
    }
)
TYPES = {
    "user": pl.Int64,
    "item_id": pl.String,
    "timestamp": pl.Int64,
    "event_type_name": pl.String,
    "event_id": pl.String,
    "arrival": pl.UInt64,
}


@pytest.mark.parametrize("kind", ["id", "arrival", "hash"])
@settings(max_examples=60, deadline=None)
@given(st.lists(EVENT, min_size=1, max_size=25), st.booleans())
def test_the_sort_is_the_order_of_the_librarys_keys(kind, events, has_types):
    rows = [event | {"arrival": number} for number, event in enumerate(events)]
    if not has_types:
        rows = [row | {"event_type_name": None} for row in rows]

    def key(row: dict) -> tuple[int, bytes]:
        ids = {"event_id": row["event_id"], "event_type": row["event_type_name"], "arrival": row["arrival"]}
        return order_key(kind, row["timestamp"], row["item_id"], **ids)

    frame = pl.DataFrame(rows, schema=TYPES).with_columns(
        item_hash=pl.Series([item_hash(row["item_id"]) for row in rows], dtype=pl.UInt64)
    )
    ordered, ties = sort_by_order(frame if has_types else frame.drop("event_type_name"), kind)

    expected = sorted(rows, key=lambda row: (row["user"], key(row)))  # stable: arrival ends equal keys
    assert ordered["arrival"].to_list() == [row["arrival"] for row in expected]
    assert ties.to_pylist() == [key(row)[1] for row in expected]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, 70_000, 2**31]), st.integers(0, 3) | st.integers(0, 2**60))))
def test_the_order_by_time_is_a_stable_sort(events):
    user, timestamp = (
        (np.array(column, dtype=np.int64) for column in zip(*events)) if events else (np.empty(0, int),) * 2
    )
    assert order_by_time(user, timestamp).tolist() == sorted(range(len(events)), key=lambda row: events[row])


def counted(log: pl.DataFrame) -> TiedPairs:
    user, _ = encode(log["user_id"])
    items = log["item_id"].unique().sort()
    item = log["item_id"].replace_strict(items, range(len(items)), return_dtype=pl.Int32)
    order = order_by_time(user, log["timestamp"].to_numpy())
    return count_tied_pairs(log.with_columns(user=pl.Series(user), item=item)[order], audit_ranks(items))


def audited(log: pl.DataFrame) -> TieAudit:
    return counted(log).audit()


def baskets(item_ids: list[list], event_ids: bool = False) -> pl.DataFrame:
    """One user and one time a basket."""
    rows = [(f"u{n}", str(item), 7) for n, basket in enumerate(item_ids) for item in basket]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return frame.with_columns(event_id=pl.format("e{}", pl.int_range(pl.len()) + 10_000)) if event_ids else frame


def test_the_audit_counts_gaps_targets_and_pairs():
    log = pl.DataFrame(
        {
            "user_id": ["b", "a", "a", "a", "a", "b", "c"],
            "item_id": ["5", "9", "10", "10", "2", "6", "1"],
            "timestamp": [1, 1, 1, 1, 8, 1, 3],
        }
    )

    audit = audited(log)

    # Gaps: a has 0 (9, 10), 0 (10, 10: one item, no pair), 7; b has 0 (5, 6). Last events tied: b's, of 3 users.
    assert audit.gap_0_share == 3 / 4
    assert audit.tied_target_share == 1 / 3
    assert (audit.num_tied_pairs, audit.next_id_greater) == (2, 1.0)
    assert not audit.is_artefact


def test_ids_that_are_integers_compare_as_numbers_and_others_as_bytes():
    assert audited(baskets([["9", "10"]])).next_id_greater == 1.0
    assert audited(baskets([["9", "10"], ["x"]])).next_id_greater == 0.0
    assert audited(baskets([["010", "10"], ["9"]])).num_tied_pairs == 0
    assert audited(baskets([["010", "10"], ["x"]])).num_tied_pairs == 1


@pytest.mark.parametrize(("pairs", "is_artefact"), [(999, False), (1_000, True)])
def test_sorted_ties_are_an_artefact_from_1000_pairs_on(pairs, is_artefact):
    assert audited(baskets([[1, 2]] * pairs)).is_artefact is is_artefact
    assert audited(baskets([[2, 1]] * pairs)).is_artefact is is_artefact


@pytest.mark.parametrize(("ascending", "is_artefact"), [(500, False), (550, False), (551, True), (449, True)])
def test_more_than_5_hundredths_from_a_half_is_an_artefact(ascending, is_artefact):
    log = baskets([[1, 2]] * ascending + [[2, 1]] * (1_000 - ascending))
    assert audited(log).is_artefact is is_artefact


def test_event_ids_that_follow_a_sorted_source_are_an_artefact_too():
    audit = audited(baskets([[1, 2]] * 1_000, event_ids=True))
    assert audit.order == "id"
    assert audit.is_artefact


def test_counts_of_buckets_add_up_to_those_of_the_log():
    log = pl.DataFrame(lifelong_log(3, 30, 9, median_length=20))
    buckets = log.with_columns(bucket=pl.col("user_id").str.slice(-1)).partition_by("bucket", include_key=False)
    total = counted(buckets[0])
    for bucket in buckets[1:]:
        total += counted(bucket)
    assert total == counted(log)


def sorted_baskets(num_users: int = 60) -> dict[str, list]:
    """20 items at one time for each user, sorted by item id: 19 tied pairs a user."""
    return {
        "user_id": [f"u{user}" for user in range(num_users) for _ in range(20)],
        "item_id": [f"i{item:02d}" for _ in range(num_users) for item in range(20)],
        "timestamp": [7] * (20 * num_users),
    }


def test_sorted_ties_choose_hash_order_and_tie_overrides(prepared):
    log = sorted_baskets()
    assert (prepared(log).manifest.tie, prepared(log).manifest.tie_chosen_by) == ("hash", "audit")
    assert (prepared(log, tie="arrival").manifest.tie, prepared(log, tie="arrival").manifest.tie_chosen_by) == (
        "arrival",
        "config",
    )
    few = prepared(sorted_baskets(20)).manifest
    assert (few.tie, few.tie_chosen_by) == ("arrival", "default")


def test_hash_order_is_one_order_of_items_per_time_for_all_users(prepared):
    dataset = prepared(sorted_baskets())
    items = dataset.histories.item_index.reshape(-1, 20)
    assert (items == items[0]).all()
    assert (np.diff(items[0]) < 0).any()


def test_event_ids_order_ties_where_the_log_has_them(prepared):
    log = {"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "timestamp": [5] * 3, "event_id": ["c", "b", "a"]}
    dataset = prepared(log)
    assert dataset.manifest.tie == "id"
    assert [dataset.items.item_id[index] for index in dataset.histories.item_index] == ["z", "y", "x"]


def test_tie_id_without_event_ids_is_refused(prepared):
    with pytest.raises(SchemaError, match="expected a log with event ids"):
        prepared({"user_id": ["a"], "item_id": ["x"], "timestamp": [1]}, tie="id")


@pytest.mark.parametrize("kind", ["hash", "id"])
def test_the_content_hash_does_not_depend_on_the_order_of_the_rows(prepared, kind):
    log = lifelong_log(5, 20, 15, median_length=12, event_types=True, event_ids=kind == "id")
    shuffled = log.take(np.random.default_rng(0).permutation(log.num_rows))

    first, second = prepared(log.to_pydict(), tie=kind), prepared(shuffled.to_pydict(), tie=kind)

    assert first.manifest.content_hash == second.manifest.content_hash
    assert first.manifest.split_hash == second.manifest.split_hash
    assert first.items.item_id == second.items.item_id


def test_the_content_hash_depends_on_every_event(prepared):
    log = lifelong_log(5, 20, 15, median_length=12).to_pydict()
    first = prepared(log).manifest
    log["timestamp"][3] += 1
    assert prepared(log).manifest.content_hash != first.content_hash
