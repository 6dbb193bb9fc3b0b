"""Batches hold exactly what a plain Python reading of the histories holds."""

from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recsys_ksa.config import RunConfig
from recsys_ksa.data.assemble import questions_batch, span_start
from recsys_ksa.data.batches import Batch
from recsys_ksa.data.jagged_arrays import lowest_within, offsets_of, ragged_arange, run_offsets
from recsys_ksa.data.own_items import own_items
from recsys_ksa.data.training_batches import TrainingBatches
from recsys_ksa.errors import ConfigError, DataError
from recsys_ksa.features import NO_GAP, gap_bucket, request_bucket

LENGTHS = [1, 0, 7, 8, 9, 40, 3, 100]
CHUNK = 8


def histories(rng: np.random.Generator, lengths: list[int] = LENGTHS, types: bool = False) -> SimpleNamespace:
    total = sum(lengths)
    return SimpleNamespace(
        offsets=offsets_of(np.array(lengths)),
        item_index=rng.integers(0, 12, total).astype(np.int32),
        # Far apart, so that a user is known by any event of theirs; the first user's times are below 0.
        timestamp=np.concatenate(
            [1000 * u - 500 + np.sort(rng.integers(0, 3 * n // 2 + 1, n)) for u, n in enumerate(lengths)]
        ),
        event_type=rng.integers(0, 3, total).astype(np.int8) if types else None,
    )


def config(**loss: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "seed": 3,
            "model": {"chunk_size": CHUNK, "own_item_bias": True},
            "data": {"max_length": 24},
            "loss": loss,
            "train": {"batch_tokens": 50},
        }
    )


def events(data: SimpleNamespace, user: int) -> list[tuple[int, int]]:
    rows = slice(data.offsets[user], data.offsets[user + 1])
    return list(zip(data.item_index[rows].tolist(), data.timestamp[rows].tolist()))


def users_of(data: SimpleNamespace, batch: Batch) -> list[int]:
    """The histories a batch was cut from, found by their rows."""
    found = []
    for u in range(batch.num_users):
        rows = slice(batch.offsets[u], batch.offsets[u + 1])
        given = list(zip(batch.item_index[rows].tolist(), batch.timestamp[rows].tolist()))
        start = int(batch.first_position[u])
        found.append(
            next(
                user
                for user in range(len(data.offsets) - 1)
                if len(given) and events(data, user)[start : start + len(given)] == given
            )
        )
    return found


def test_ragged_arange_counts_within_each_row() -> None:
    assert ragged_arange(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]


def test_the_lowest_of_each_owner_are_kept(rng: np.random.Generator) -> None:
    sizes = rng.integers(0, 9, 20)
    owner, key = np.repeat(np.arange(20), sizes), rng.permutation(int(sizes.sum()))
    kept = lowest_within(owner, key, 4)
    for user in range(20):
        assert sorted(key[kept & (owner == user)]) == sorted(key[owner == user])[:4]
    assert run_offsets(owner).tolist() == [0, *np.cumsum(sizes[sizes > 0]).tolist()]


def test_a_span_begins_at_a_chunk_boundary_and_fits() -> None:
    end = np.arange(60)
    start = span_start(end, 24, CHUNK)
    assert not np.any(start % CHUNK)
    assert np.all(end - start <= 24)
    assert np.all((start == 0) | (end - start > 24 - CHUNK))


def test_events_keep_true_positions_gaps_and_types(rng: np.random.Generator) -> None:
    data = histories(rng, types=True)
    users, cuts = np.array([7, 2, 1, 5]), np.array([90, 7, 0, 40])
    batch = questions_batch(data, users, np.arange(4), cuts, chunk_size=CHUNK, max_length=24)
    for u, (user, cut) in enumerate(zip(users, cuts)):
        start = int(batch.first_position[u])
        expected = events(data, user)[start:cut]
        rows = slice(batch.offsets[u], batch.offsets[u + 1])
        assert batch.item_index[rows].tolist() == [item for item, _ in expected]
        assert batch.timestamp[rows].tolist() == [time for _, time in expected]
        times = [time for _, time in events(data, user)]
        gaps = [gap_bucket(times[i] - times[i - 1]) if i else NO_GAP for i in range(start, cut)]
        assert batch.gap_bucket[rows].tolist() == gaps
        base = data.offsets[user]
        assert batch.event_type is not None
        assert batch.event_type[rows].tolist() == data.event_type[base + start : base + cut].tolist()


def test_a_question_is_asked_from_the_last_event_it_knows(rng: np.random.Generator) -> None:
    data = histories(rng)
    users, question_user = np.array([5, 0, 7]), np.array([0, 0, 0, 1, 2])
    cuts, times = np.array([0, 3, 40, 1, 99]), np.array([5, 4_700, -99, 504, 10_000])
    batch = questions_batch(data, users, question_user, cuts, times, chunk_size=CHUNK)
    for q, (u, cut, time) in enumerate(zip(question_user, cuts, times)):
        history = events(data, users[u])
        row = int(batch.question_row[q])
        if cut == 0:
            assert (row, int(batch.request_bucket[q])) == (-1, NO_GAP)
            continue
        item, last = history[cut - 1]
        assert row == int(batch.offsets[u]) + cut - 1
        assert (int(batch.item_index[row]), int(batch.timestamp[row])) == (item, last)
        assert int(batch.request_bucket[q]) == request_bucket(last, int(time))
        assert int(batch.request_time[q]) == max(int(time), last)


def test_without_request_times_none_is_shown(rng: np.random.Generator) -> None:
    data = histories(rng)
    batch = questions_batch(data, np.array([5]), np.array([0, 0]), np.array([0, 9]), chunk_size=CHUNK)
    assert batch.request_bucket.tolist() == [NO_GAP, NO_GAP]
    assert batch.request_time.tolist() == [0, events(data, 5)[8][1]]


def test_unsorted_or_cut_off_questions_are_refused(rng: np.random.Generator) -> None:
    data = histories(rng)
    with pytest.raises(DataError, match="sorted by user, then cut"):
        questions_batch(data, np.array([5]), np.array([0, 0]), np.array([9, 3]), chunk_size=CHUNK)
    with pytest.raises(DataError, match="before the given span"):
        questions_batch(data, np.array([7]), np.array([0, 0]), np.array([5, 90]), chunk_size=CHUNK, max_length=16)


def test_own_items_are_the_history_counted_at_each_question(rng: np.random.Generator) -> None:
    data = histories(rng)
    users, question_user = np.array([7, 1, 2, 5, 0]), np.array([0, 0, 0, 2, 3, 3])
    cuts = np.array([0, 30, 100, 4, 17, 17])
    batch = questions_batch(data, users, question_user, cuts, chunk_size=CHUNK, max_length=None, own_items=True)
    own = batch.own
    assert own is not None
    assert own.question_offsets_list == (0, 3, 3, 4, 6, 6)
    for u, user in enumerate(users):
        asked = cuts[question_user == u]
        items = own.item[own.item_offsets[u] : own.item_offsets[u + 1]].tolist()
        known = events(data, user)[: max(asked, default=0)]
        assert items == sorted({item for item, _ in known if item})
        first_slot, end_slot = own.item_offsets[u : u + 2].tolist()
        block = slice(int(own.pair_offsets[first_slot]), int(own.pair_offsets[end_slot]))
        shape = (len(items), len(asked))
        assert own.shapes[u] == shape
        count, first, last = (t[block].view(shape).T.tolist() for t in (own.count, own.first, own.last))
        for q, cut in enumerate(asked):
            for o, item in enumerate(items):
                times = [time for have, time in events(data, user)[:cut] if have == item]
                assert count[q][o] == len(times)
                assert (first[q][o], last[q][o]) == ((times[0], times[-1]) if times else (0, 0))


@pytest.mark.parametrize("limit", [None, 1, 4])
def test_own_items_equal_loops_over_random_questions(limit: int | None, rng: np.random.Generator) -> None:
    lengths = rng.integers(0, 25, 30)
    data = histories(rng, lengths.tolist())
    users = rng.permutation(30)[:12]
    asked = [sorted(rng.integers(0, lengths[user] + 1, rng.integers(0, 5)).tolist()) for user in users]
    question_user = np.repeat(np.arange(12), [len(cuts) for cuts in asked])
    cuts = np.array(list(chain(*asked)), dtype=np.int64)
    target_question = np.sort(rng.integers(0, max(len(cuts), 1), 2 * len(cuts)))
    target_item = rng.integers(1, 14, len(target_question))  # 12 and 13 are in no history
    own = own_items(data, users, question_user, cuts, target_question, target_item, limit)
    assert own.question_offsets_list == tuple(offsets_of(np.bincount(question_user, minlength=12)).tolist())
    kept, pair = [], 0
    for u, user in enumerate(users):
        known = events(data, user)[: max(asked[u], default=0)]
        latest = list(dict.fromkeys(item for item, _ in reversed(known) if item))
        wanted = set(target_item[question_user[target_question] == u].tolist())
        latest.sort(key=lambda item: item not in wanted)  # targets first, each part still the latest first
        kept.append(sorted(latest[:limit]))
        for item in kept[u]:
            for nth, cut in enumerate(asked[u]):
                times = [time for have, time in events(data, user)[:cut] if have == item]
                assert int(own.count[pair]) == len(times)
                assert (int(own.first[pair]), int(own.last[pair])) == ((times[0], times[-1]) if times else (0, 0))
                question = own.question_offsets_list[u] + nth
                asks = own.target_pair[(target_question == question) & (target_item == item)]
                assert asks.tolist() == [pair if times else -1] * len(asks)
                pair += 1
    assert own.item.tolist() == list(chain(*kept))
    assert own.item_offsets_list == tuple(offsets_of(np.array([len(items) for items in kept])).tolist())
    assert own.num_pairs == pair
    owned = [item in kept[question_user[question]] for question, item in zip(target_question, target_item)]
    assert not np.any((own.target_pair.numpy() >= 0) & ~np.array(owned, dtype=bool))


def test_owned_items_before_the_given_span_count_too(rng: np.random.Generator) -> None:
    data = histories(rng)
    whole, cut = (
        questions_batch(
            data, np.array([7]), np.array([0]), np.array([100]), chunk_size=CHUNK, own_items=True, max_length=length
        ).own
        for length in (None, 16)
    )
    assert whole is not None
    assert cut is not None
    assert torch.equal(whole.count, cut.count)
    assert torch.equal(whole.first, cut.first)


def test_a_limit_keeps_the_latest_owned_items(rng: np.random.Generator) -> None:
    data = histories(rng)
    own = questions_batch(
        data, np.array([7]), np.array([0]), np.array([100]), chunk_size=CHUNK, own_items=True, max_own_items=3
    ).own
    assert own is not None
    latest = list(dict.fromkeys(item for item, _ in reversed(events(data, 7)) if item))[:3]
    assert own.item.tolist() == sorted(latest)


def test_next_event_asks_for_every_event_after_the_first_given(rng: np.random.Generator) -> None:
    data = histories(rng)
    end = np.array(LENGTHS)
    batches = TrainingBatches(data, end, config(targets="next-event", request_time_dropout=0.0))
    seen = 0
    for position in range(batches.num_batches(0)):
        batch = batches.batch(0, position)
        users = users_of(data, batch)
        for q, item in zip(batch.target_question.tolist(), batch.target_item.tolist()):
            u, row = int(batch.question_user[q]), int(batch.question_row[q])
            cut = 0 if row < 0 else int(batch.first_position[u]) + row - int(batch.offsets[u]) + 1
            wanted, time = events(data, users[u])[cut]
            assert item == wanted
            if cut:
                assert int(batch.request_bucket[q]) == gap_bucket(time - events(data, users[u])[cut - 1][1])
            seen += 1
    asked = sum(n - (start if start == 0 else start + 1) for n, start in zip(end, span_start(end, 24, CHUNK)))
    unknown = sum(
        events(data, user)[cut][0] == 0
        for user, (n, start) in enumerate(zip(end, span_start(end, 24, CHUNK)))
        for cut in range(start + (start > 0), n)
    )
    assert seen == asked - unknown


def test_next_set_asks_for_the_next_timestamp_from_strictly_earlier_events(rng: np.random.Generator) -> None:
    data = histories(rng)
    end = np.array(LENGTHS)
    batches = TrainingBatches(data, end, config(targets="next-set", request_time="drawn", request_time_dropout=0.0))
    asked = Counter()
    for position in range(batches.num_batches(0)):
        batch = batches.batch(0, position)
        users = users_of(data, batch)
        assert batch.own is not None
        for q in range(batch.num_questions):
            u, row = int(batch.question_user[q]), int(batch.question_row[q])
            history = events(data, users[u])
            cut = 0 if row < 0 else int(batch.first_position[u]) + row - int(batch.offsets[u]) + 1
            time = history[cut][1]
            assert cut == 0 or history[cut - 1][1] < time
            wanted = Counter(item for item, at in history if at == time and item)
            mine = batch.target_question == q
            given = dict(zip(batch.target_item[mine].tolist(), batch.target_weight[mine].tolist()))
            total = sum(wanted.values())
            assert given == pytest.approx({item: count / total for item, count in wanted.items()})
            if cut:
                assert history[cut - 1][1] <= int(batch.request_time[q]) <= time
            asked[users[u]] += 1
            owned = {item for item, _ in history[:cut]}
            for pair, item in zip(batch.own.target_pair[mine].tolist(), batch.target_item[mine].tolist()):
                assert (pair >= 0) == (item in owned)
                if pair >= 0:
                    assert batch.own.count[pair] == sum(have == item for have, _ in history[:cut])
    for user, (n, start) in enumerate(zip(end, span_start(end, 24, CHUNK))):
        groups = len({time for _, time in events(data, user)[start:n]})
        assert asked[user] == groups - (start > 0)


def test_questions_per_user_bounds_the_questions_and_changes_with_the_epoch(rng: np.random.Generator) -> None:
    data = histories(rng, [24] * 4)
    batches = TrainingBatches(data, np.full(4, 24), config(questions_per_user=5))
    rows = []
    for epoch in range(2):
        drawn = [batches.batch(epoch, position) for position in range(batches.num_batches(epoch))]
        assert all(torch.bincount(batch.question_user).le(5).all() for batch in drawn)
        rows.append([batch.question_row.tolist() for batch in drawn])
    assert rows[0] != rows[1]


def test_request_times_are_dropped_where_the_config_says(rng: np.random.Generator) -> None:
    data = histories(rng, [24] * 4)
    batch = TrainingBatches(data, np.full(4, 24), config(request_time_dropout=1.0)).batch(0, 0)
    known = batch.question_row >= 0
    assert not batch.request_bucket.any()
    assert torch.equal(batch.request_time[known], batch.timestamp[batch.question_row[known]])


def test_training_never_reads_beyond_the_span(rng: np.random.Generator) -> None:
    data, end = histories(rng), np.array([1, 0, 5, 8, 3, 31, 1, 77])
    batches = TrainingBatches(data, end, config())
    before = [batches.batch(0, position) for position in range(batches.num_batches(0))]
    for user, stop in enumerate(end):
        future = slice(data.offsets[user] + stop, data.offsets[user + 1])
        data.item_index[future], data.timestamp[future] = 11, 10**6
    for position, batch in enumerate(before):
        after = batches.batch(0, position)
        assert torch.equal(batch.item_index, after.item_index)
        assert torch.equal(batch.target_item, after.target_item)
        assert torch.equal(batch.request_time, after.request_time)
        assert batch.own is not None
        assert after.own is not None
        assert torch.equal(batch.own.last, after.own.last)


def test_each_user_comes_once_an_epoch_within_the_budget(rng: np.random.Generator) -> None:
    data, end = histories(rng), np.array(LENGTHS)
    batches = TrainingBatches(data, end, config())
    for epoch in range(2):
        drawn = [batches.batch(epoch, position) for position in range(batches.num_batches(epoch))]
        assert sum(batch.num_users for batch in drawn) == np.count_nonzero(end)
        assert sum(batch.num_events for batch in drawn) == batches.tokens_per_epoch
        assert all(batch.num_events <= 50 for batch in drawn)


def test_a_batch_depends_on_its_place_alone(rng: np.random.Generator) -> None:
    data, end = histories(rng), np.array(LENGTHS)
    one, two = (TrainingBatches(data, end, config()) for _ in range(2))
    one.batch(0, 0)
    one.batch(1, 1)
    first, second = one.batch(2, 1), two.batch(2, 1)
    assert torch.equal(first.item_index, second.item_index)
    assert torch.equal(first.question_row, second.question_row)
    assert torch.equal(first.request_time, second.request_time)


@pytest.mark.parametrize("changes", [{}, {"stochastic_length": 1.5}, {"shuffle_events": 60}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_share_an_epoch_and_each_batch_depends_on_its_place_alone(
    changes: dict[str, object], world_size: int, rng: np.random.Generator
) -> None:
    lengths = [*LENGTHS, *rng.integers(1, 30, 40).tolist()]
    data, end = histories(rng, lengths), np.array(lengths)
    base = config()
    long = base.model_copy(update={"data": base.data.model_copy(update={"max_length": 48} | changes)})
    ranks = [TrainingBatches(data, end, long, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({batches.num_batches(1) for batches in ranks}) == 1
    seen = Counter()
    for rank, batches in enumerate(ranks):
        for position in range(batches.num_batches(1)):
            batch = batches.batch(1, position)
            seen.update(users_of(data, batch))
            assert not torch.any(batch.first_position % CHUNK)
            fresh = TrainingBatches(data, end, long, rank=rank, world_size=world_size).batch(1, position)
            assert torch.equal(batch.item_index, fresh.item_index)
            assert torch.equal(batch.question_row, fresh.question_row)
            assert torch.equal(batch.request_time, fresh.request_time)
    assert seen == Counter(np.flatnonzero(end).tolist())


def test_stochastic_length_reads_fewer_events_and_others_each_epoch(rng: np.random.Generator) -> None:
    data, end = histories(rng, [100] * 40), np.full(40, 100)
    base = config()
    drawn = base.model_copy(update={"data": base.data.model_copy(update={"max_length": 96, "stochastic_length": 1.6})})
    batches = TrainingBatches(data, end, drawn)
    short = int(96**0.8)
    sizes = []
    for epoch in range(2):
        starts = [batches.batch(epoch, position) for position in range(batches.num_batches(epoch))]
        lengths = torch.cat([batch.offsets.diff() for batch in starts])
        assert set(lengths.tolist()) == {100 - 64, 100 - 8}  # the newest `short`, or 96, from a chunk boundary on
        assert 100 - 64 <= short < 100 - 56
        sizes.append(sorted(users_of(data, batch)[0] for batch in starts if batch.num_events > 100 - 64))
    assert sizes[0] != sizes[1]


def test_a_span_shorter_than_a_chunk_is_refused(rng: np.random.Generator) -> None:
    short = config().model_copy(update={"data": config().data.model_copy(update={"max_length": 7})})
    with pytest.raises(ConfigError, match=r"data\.max_length: expected at least model\.chunk_size 8, got 7"):
        TrainingBatches(histories(rng), np.array(LENGTHS), short)


def test_an_empty_training_span_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="expected users with events"):
        TrainingBatches(histories(rng), np.zeros(8, dtype=int), config())


def test_a_batch_moves_whole(rng: np.random.Generator) -> None:
    batch = TrainingBatches(histories(rng), np.array(LENGTHS), config()).batch(0, 0)
    moved = batch.to("meta")
    assert moved.item_index.device.type == "meta"
    assert moved.own is not None
    assert moved.own.event_pair.device.type == "meta"


def test_a_limit_never_drops_an_owned_target(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    data = histories(rng, [60] * 12)
    owned = {}
    for limit in (10**6, 2):
        monkeypatch.setattr("recsys_ksa.data.training_batches.MAX_OWN_ITEMS", limit)
        batches = TrainingBatches(data, np.full(12, 60), config(questions_per_user=1))
        drawn = [batches.batch(epoch, position).own for epoch in range(3) for position in range(6)]
        owned[limit] = [own.target_pair >= 0 for own in drawn if own is not None]
        assert all(own is not None and own.item_offsets.diff().le(limit).all() for own in drawn)
    assert all(torch.equal(whole, limited) for whole, limited in zip(owned[10**6], owned[2]))
