"""The library's front door: states as values, one order, defined answers for the edges."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recsys_ksa import OutOfOrderError, Recommender
from recsys_ksa.cli import call_verb
from recsys_ksa.errors import DataError, RunError, StateError
from recsys_ksa.model.state import kv_bytes
from recsys_ksa.testing import trained_run

START = 1_600_000_000


@pytest.fixture(scope="module")
def rec(tiny_run: Path) -> Recommender:
    return Recommender.load(tiny_run)


def draw_events(rec: Recommender, rng: np.random.Generator, count: int) -> tuple[list[str], list[int], list[str]]:
    known = [item for item in rec.run.items.item_id if item]
    items = [str(rng.choice(known)) if rng.random() > 0.05 else "never-seen" for _ in range(count)]
    times = (START + np.cumsum(rng.integers(0, 3, count) * rng.integers(0, 50_000, count))).tolist()
    types = [str(rng.choice([*rec.run.event_types, "unheard"])) for _ in range(count)]
    return items, times, types


@pytest.mark.parametrize("tie", ["arrival", "hash"])
def test_append_equals_one_pass_for_any_cut(tie: str, tiny_run: Path, rng: np.random.Generator) -> None:
    exact = Recommender.load(tiny_run, precision="float64")
    exact.run = replace(exact.run, info=exact.run.info.model_copy(update={"tie": tie}))
    items, times, types = draw_events(exact, rng, 90)
    order = sorted(range(90), key=lambda at: times[at])
    whole = exact.append(exact.new_state(), items, times, types)
    state, at = exact.new_state(), 0
    while at < 90:
        step = int(rng.integers(1, 20))
        # Cut between seconds: arrivals of one second in two calls would be late by the order of their ties.
        while at + step < 90 and times[order[at + step]] == times[order[at + step - 1]]:
            step += 1
        part = order[at : at + step]
        if tie == "hash":  # then the order of arrival inside a second means nothing
            part = rng.permutation(part)
        state = exact.append(state, *([column[i] for i in part] for column in (items, times, types)))
        at += step
    now = times[-1] + 500
    a, b = exact.user_vector(state, now), exact.user_vector(whole, now)
    assert float((a - b).norm() / b.norm()) <= 1e-10
    assert state.history_hash == whole.history_hash
    assert state.num_events == whole.num_events == 90
    assert state.num_unknown == items.count("never-seen")
    for name in ("item_index", "count", "first", "last"):
        assert np.array_equal(getattr(state.seen, name), getattr(whole.seen, name))
    assert exact.recommend(state, 100, now)[0][0] == exact.recommend(whole, 100, now)[0][0]


def test_the_old_state_stays_valid(rec: Recommender, rng: np.random.Generator) -> None:
    items, times, types = draw_events(rec, rng, 40)
    before = rec.append(rec.new_state(), items[:30], times[:30], types[:30])
    answer = rec.recommend(before, 5, times[-1])
    rec.append(before, items[30:], [max(times) + 1 + i for i in range(10)], types[30:])
    assert rec.recommend(before, 5, times[-1]) == answer


def test_recommend_equals_scoring_every_item(rec: Recommender, rng: np.random.Generator) -> None:
    items, times, types = draw_events(rec, rng, 60)
    state = rec.append(rec.new_state(), items, times, types)
    now = times[-1] + 86_400
    scores = (rec.network.item_vectors() @ rec.user_vector(state, now)).detach().numpy().copy()
    for item, count, first, last in zip(state.seen.item_index, state.seen.count, state.seen.first, state.seen.last):
        arguments = [torch.tensor(int(value)) for value in (item, count, first, last, now)]
        scores[item] += float(rec.network.own_bias(*arguments))
    scores[0] = -np.inf
    expected = np.sort(scores)[::-1][:20]
    got = rec.recommend(state, 20, now)
    answered = [rec.run.items.index_of[item] for item, _ in got]
    assert len(set(answered)) == 20
    np.testing.assert_allclose([score for _, score in got], expected, rtol=1e-5, atol=1e-5)
    # Whose scores differ by less than rounding may trade places.
    np.testing.assert_allclose(scores[answered], expected, rtol=1e-5, atol=1e-5)


def test_again_and_new_for_you_share_nothing(rec: Recommender, rng: np.random.Generator) -> None:
    items, times, types = draw_events(rec, rng, 30)
    state = rec.append(rec.new_state(), items, times, types)
    owned = set(items) - {"never-seen"}
    again = {item for item, _ in rec.recommend(state, 1000, only_seen=True)}
    new = {item for item, _ in rec.recommend(state, 1000, exclude_seen=True)}
    assert again == owned
    assert new == {item for item in rec.run.items.item_id if item} - owned
    with pytest.raises(DataError, match="got both"):
        rec.recommend(state, only_seen=True, exclude_seen=True)


def test_a_user_without_events_is_answered(rec: Recommender) -> None:
    state = rec.new_state()
    assert len(rec.recommend(state, 5)) == 5
    assert rec.recommend(state, 5, only_seen=True) == []
    assert rec.recommend(state, 5, request_time=START) == rec.recommend(state, 5)
    assert (state.num_events, state.nbytes, state.seen_nbytes) == (0, 0, 0)


def test_unknown_items_are_read_and_counted_but_never_recommended(rec: Recommender) -> None:
    state = rec.append(rec.new_state(), ["nobody-knows", "me-neither"], [START, START + 5])
    assert (state.num_events, state.num_unknown, state.seen_nbytes) == (2, 2, 0)
    answer = rec.recommend(state, 10_000)
    assert len(answer) == rec.run.info.num_items - 1
    assert "nobody-knows" not in dict(answer)


def test_items_whose_id_was_blanked_are_never_answered(tiny_run: Path, rng: np.random.Generator) -> None:
    rec = Recommender.load(tiny_run)
    items, times, types = draw_events(rec, rng, 20)
    before = dict(rec.recommend(rec.append(rec.new_state(), items, times, types), k=5))
    for item in before:
        rec.run.items.item_id[rec.run.items.index_of[item]] = None
    forgetful = Recommender(rec.run, rec.network, rec.index, popularity=rec.popularity)
    after = forgetful.recommend(forgetful.append(forgetful.new_state(), items, times, types), k=5)
    assert len(after) == 5
    assert not {item for item, _ in after} & {*before, "None"}


def test_a_late_event_is_refused_and_nothing_changes(rec: Recommender, rng: np.random.Generator) -> None:
    items, times, types = draw_events(rec, rng, 10)
    state = rec.append(rec.new_state(), items, times, types)
    with pytest.raises(OutOfOrderError, match="Rebuild"):
        rec.append(state, ["x"], [times[0] - 1])
    assert state.num_events == 10


def test_request_time_before_the_last_event_counts_as_gap_0(rec: Recommender, rng: np.random.Generator) -> None:
    items, times, types = draw_events(rec, rng, 12)
    state = rec.append(rec.new_state(), items, times, types)
    assert torch.equal(rec.user_vector(state, times[-1] - 10_000), rec.user_vector(state, times[-1]))
    assert not torch.equal(rec.user_vector(state, times[-1]), rec.user_vector(state))


def test_bytes_of_a_state(rec: Recommender, rng: np.random.Generator) -> None:
    items, times, types = draw_events(rec, rng, 77)
    state = rec.append(rec.new_state(), items, times, types)
    assert state.nbytes == kv_bytes(rec.run.config.model, 77)
    assert state.seen_nbytes == 24 * len(set(items) - {"never-seen"})
    assert state.fixed_nbytes > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda rec, state: rec.append(state, ["a"], [1, 2]),
        lambda rec, state: rec.append(state, ["a"], [1.5]),
        lambda rec, state: rec.append(state, ["a"], [-1]),
        lambda rec, state: rec.append(state, [None], [1]),
        lambda rec, state: rec.append(state, ["a"], [1], event_types=["x", "y"]),
        lambda rec, state: rec.append(state, ["a"], [1], features={"price": [3]}),
        lambda rec, state: rec.recommend(state, 0),
    ],
)
def test_bad_input_is_named(rec: Recommender, call: Callable[[Recommender, object], object]) -> None:
    with pytest.raises(DataError):
        call(rec, rec.new_state())


def test_a_state_of_other_weights_is_refused(rec: Recommender, tiny_run: Path, tmp_path: Path) -> None:
    other = Recommender.load(tiny_run, precision="float64")
    with pytest.raises(StateError, match="expected one of this network"):
        rec.append(other.new_state(), ["a"], [START])


def test_index_and_memory_search_agree(tiny_run: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    plain = Recommender.load(run)
    call_verb("index", [str(run), "--export", str(tmp_path / "bundle")])
    for path in (run, tmp_path / "bundle"):
        indexed = Recommender.load(path)
        assert "FAISS" in indexed.index.kind
        assert indexed.index.version == plain.index.version
        items, times, types = draw_events(plain, rng, 25)
        a = dict(plain.recommend(plain.append(plain.new_state(), items, times, types), 10_000))
        b = dict(indexed.recommend(indexed.append(indexed.new_state(), items, times, types), 50))
        assert len(b) == 50
        best = list(a.values())[:50]
        np.testing.assert_allclose(list(b.values()), best, rtol=1e-5, atol=1e-5)
        # Whose scores differ by less than rounding may trade places.
        np.testing.assert_allclose([a[item] for item in b], best, rtol=1e-5, atol=1e-5)
    assert not list((tmp_path / "bundle").rglob("*optim*"))


def test_replaced_weights_and_stale_indexes_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    call_verb("index", [str(run)])
    vectors = load_file(run / "index" / "item_vectors.safetensors")["item_vectors"]
    vectors[3] += 0.1
    save_file({"item_vectors": vectors}, run / "index" / "item_vectors.safetensors")
    with pytest.raises(RunError, match="ksa index"):
        Recommender.load(run)
    shutil.rmtree(run / "index")
    weights = load_file(run / "model.safetensors")
    weights["start"] += 1.0
    save_file(weights, run / "model.safetensors")
    with pytest.raises(RunError, match="weights were replaced"):
        Recommender.load(run)


def test_an_index_of_another_run_is_refused(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    other, run = trained_run(tmp_path / "other", tiny_data, ["seed=5"]), tmp_path / "run"
    call_verb("index", [str(other)])
    shutil.copytree(tiny_run, run)
    shutil.copytree(other / "index", run / "index")
    with pytest.raises(RunError, match="expected the index of release"):
        Recommender.load(run)
