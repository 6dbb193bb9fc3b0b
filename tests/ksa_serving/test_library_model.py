"""The library behind the service: rewinding, bytes, batches and explanations, on random networks in float64."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ksa_kernels.sigmoid_gate import sigmoid_gate
from ksa_serving import attribution, ranking
from ksa_serving.attribution_reference import MaskedHistory
from ksa_serving.errors import OverloadedError
from ksa_serving.events import Meeting, StoredEvent
from ksa_serving.library_model import LibraryModel, first_rows
from ksa_serving.models import START, Mark, Question, Scored, StateParts
from recsys_ksa import recommender as recommender_module
from recsys_ksa.config import ModelConfig
from recsys_ksa.errors import StateError
from recsys_ksa.model.network import Network
from recsys_ksa.model.pages import PagePool
from recsys_ksa.model.state import SharedRows, UserState
from recsys_ksa.recommender import Recommender
from recsys_ksa.retrieval.index import TorchIndex
from recsys_ksa.run import open_run

T0 = 1_600_000_000
SHAPES: list[dict[str, Any]] = [
    {},
    {"chunk_size": 4, "summaries_per_chunk": 2, "window_chunks": 1},
    {"window_chunks": 0},
    {"layers": ["summary", "full", "summary"]},
    {"layers": ["summary", "full"]},
    {"attention": "window"},
    {"num_kv_heads": 1},
    {"in_pages": True},
    {"in_pages": True, "chunk_size": 4, "summaries_per_chunk": 2, "window_chunks": 1},
    {"in_pages": True, "attention": "window"},
    {"calendar": ["hour", "weekday"], "session_gap": 40, "value_edges": [0.5, 2.0], "window_chunks": 0},
]


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Any:
    return open_run(tiny_run)


def make_model(run: Any, seed: int, in_pages: bool = False, with_rhythm: bool = False, **shape: Any) -> LibraryModel:
    torch.manual_seed(seed)
    config = ModelConfig.model_validate({**run.config.model.model_dump(), **shape})
    network = Network(config, run.features).to(torch.float64).eval().requires_grad_(False)
    if with_rhythm and network.own_items is not None:  # at first own items' counts alone tell, and no times
        torch.nn.init.normal_(network.own_items.out.weight)
    pool = PagePool(config, 1 << 26, torch.float64, torch.float64, torch.device("cpu")) if in_pages else None
    return LibraryModel(Recommender(run, network, TorchIndex(network.item_vectors()), pool=pool))


def make_history(rng: np.random.Generator, length: int) -> list[StoredEvent]:
    times = T0 + np.sort(rng.integers(0, 50 * length + 1, length))
    return [
        StoredEvent(
            n,
            f"i{rng.integers(60)}",
            int(time),
            None,
            str(rng.choice(["view", "buy"])),
            None if rng.random() < 0.2 else float(rng.choice([0.0, 1.0, 3.5])),
        )
        for n, time in enumerate(times)
    ]


def assert_same_state(found: UserState, expected: UserState) -> None:
    for ours, theirs in zip(found.memory.layers, expected.memory.layers):
        for mine, other in ((ours.events, theirs.events), (ours.summaries, theirs.summaries)):
            assert mine.num_rows == other.num_rows
            torch.testing.assert_close(mine.whole(), other.whole(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.memory.last_input, expected.memory.last_input, rtol=0, atol=1e-10)
    for told in ("history_hash", "last_key", "num_unknown", "num_events", "session_place"):
        assert getattr(found, told) == getattr(expected, told)
    for name in ("item_index", "count", "first", "last"):
        np.testing.assert_array_equal(getattr(found.seen, name), getattr(expected.seen, name))


def rounding(model: LibraryModel, question: Question, answer: Scored) -> float:
    """Return by how much two float32 scores of one item may differ that were summed in different orders.

    A score of E products is off by E * 2**-24 * |user| * |item| at most, its vectors and own gain by a few roundings.
    """
    items, user = model.recommender.item_vectors, model.recommender.user_vector(question.state, question.request_time)
    largest = float(user.norm()) * float(np.linalg.norm(items, axis=1).max())
    largest += max((abs(score) for _, score in answer), default=0.0)  # own gains are no larger than both
    return 2 * (items.shape[1] + 4) * 2**-24 * largest


def assert_same_answer(found: Scored, expected: Scored, within: float) -> None:
    """Equal scores place by place and item by item; items nearer to each other than that may change places."""
    last = expected[-1][1] if expected else 0.0
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=0, atol=within)
    ours, theirs = dict(found), dict(expected)
    assert len(ours) == len(found)
    for item in ours.keys() | theirs.keys():  # one that only one of them has competes for the last place
        assert ours.get(item, last) == pytest.approx(theirs.get(item, last), rel=0, abs=within)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rewinding_and_going_on_equals_one_pass(run: Any, shape: dict[str, Any], rng: np.random.Generator):
    model = make_model(run, int(rng.integers(2**31)), **shape)
    for length in (1, 7, 8, 9, int(rng.integers(40, 300))):
        history = make_history(rng, length)
        whole = model.append(model.new_state(), history)
        late = StoredEvent(999, "i7", int(rng.choice([event.timestamp for event in history])), None, "buy", None)
        at = sum(event.timestamp < late.timestamp for event in history)
        revised = [*history[:at], late, *history[at:]]
        for state in (whole, model.load(model.dump(whole))):  # in memory, and cold
            first = max(0, min(0, model.replay_start(at) - 1))
            rewound = model.rewind(state, at, first, revised[first:at], START)
            done = model.append(rewound, revised[at:])
            done = model.with_own_items(done, whole, [late])
            assert_same_state(done, model.append(model.new_state(), revised))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cold_state_is_made_whole_from_the_newest_events(run: Any, shape: dict[str, Any], rng: np.random.Generator):
    model = make_model(run, int(rng.integers(2**31)), **shape)
    for length in (1, 8, 9, 150, int(rng.integers(100, 400))):
        history = make_history(rng, length)
        whole = model.append(model.new_state(), history)
        cold = model.load(model.dump(whole))
        first = max(0, model.replay_start(length) - 1)
        mark = Mark(length, whole.history_hash)
        warm = model.rewind(cold, length, first, history[first:], mark)
        assert_same_state(model.with_own_items(warm, cold, []), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_state_made_from_rounded_rows_is_near_and_small(run: Any, shape: dict[str, Any], rng: np.random.Generator):
    exact = make_model(run, int(rng.integers(2**31)), **shape)
    model = LibraryModel(exact.recommender, "int8")
    history = make_history(rng, 400)
    whole = model.append(model.new_state(), history)
    parts, first = model.dump(whole), max(0, model.replay_start(400) - 1)
    cold = model.load(parts)
    made = model.rewind(cold, 400, first, history[first:], Mark(400, whole.history_hash))
    made = model.with_own_items(made, cold, [])
    difference = model.difference(made, whole)
    assert difference < 0.2
    if any(name for name in parts.segments):
        assert difference > 0
        bytes_of = [sum(len(one.segments[name]) for name in one.segments) for one in (parts, exact.dump(whole))]
        assert bytes_of[0] < bytes_of[1] / 6  # of float64
    again = model.dump(made)  # what came from rounded rows is not written anew
    assert set(again.segments) == set(parts.segments)
    with pytest.raises(StateError, match="dtype"):
        exact.load(parts)
    with pytest.raises(StateError, match="dtype"):
        model.load(exact.dump(whole))


def test_what_a_capped_state_no_longer_holds_is_refused(run: Any, rng: np.random.Generator):
    model = make_model(run, 0, max_visible_chunks=3)
    history = make_history(rng, 200)
    state = model.append(model.new_state(), history)
    with pytest.raises(StateError, match="max_visible_chunks"):
        model.rewind(state, 100, 0, history[:100], START)


@pytest.mark.parametrize("damage", ["fingerprint", "short", "text", "rows"])
def test_bytes_that_are_no_state_are_refused(run: Any, rng: np.random.Generator, damage: str):
    model = make_model(run, 0)
    parts = model.dump(model.append(model.new_state(), make_history(rng, 700)))
    segments = {name: parts.segments[name] for name in parts.segments}
    if damage == "fingerprint":
        other = make_model(run, 1)
        parts = other.dump(other.new_state())
    elif damage == "short":
        parts = StateParts(parts.about[:-5], segments)
    elif damage == "text":
        parts = StateParts(b"\x00nonsense", segments)
    else:
        first = next(iter(segments))
        parts = StateParts(parts.about, {**segments, first: segments[first][:-8]})
    with pytest.raises(StateError):
        model.load(parts)


def test_a_batch_of_questions_equals_them_one_by_one(run: Any, rng: np.random.Generator):
    model = make_model(run, 3)
    states = [model.append(model.new_state(), make_history(rng, n)) for n in (0, 1, 30, 200)]
    asked = [
        Question(state, 7, T0 + 10**6, exclude_seen, only_seen)
        for state in states
        for exclude_seen, only_seen in ((None, False), (True, False), (False, True))
    ]
    asked += [replace(asked[6], allow=frozenset({"i1", "i2", "nope"})), replace(asked[6], deny=frozenset({"i1", "i2"}))]
    together = model.recommend(asked)
    for question, answer in zip(asked, together):
        (alone,) = model.recommend([question])
        assert_same_answer(answer, alone, rounding(model, question, alone))
    assert {item for item, _ in together[-2]} <= {"i1", "i2"}
    assert not {item for item, _ in together[-1]} & {"i1", "i2"}
    assert len(together[-1]) == 7


def test_appending_users_together_equals_one_by_one(run: Any, rng: np.random.Generator):
    model = make_model(run, 4)
    lengths = (0, 3, 8, 129, 300)
    histories = [make_history(rng, n + 9) for n in lengths]
    states = [model.append(model.new_state(), history[:n]) for n, history in zip(lengths, histories)]
    together = model.append_batch(states, [history[n:] for n, history in zip(lengths, histories)])
    for state, history in zip(together, histories):
        assert_same_state(state, model.append(model.new_state(), history))


def test_a_full_pool_refuses_and_goes_on_when_states_are_let_go(run: Any, rng: np.random.Generator):
    recommender = make_model(run, 6).recommender
    pool = PagePool(recommender.network.config, 1 << 19, torch.float64, torch.float64, torch.device("cpu"))
    model = LibraryModel(Recommender(run, recommender.network, recommender.index, pool=pool))
    held: list[UserState] = []

    def fill() -> None:
        for _ in range(1000):
            held.append(model.append(model.new_state(), make_history(rng, 200)))

    with pytest.raises(OverloadedError, match="Hold fewer states"):
        fill()
    with pytest.raises(OverloadedError, match="Hold fewer states"):
        model.append_batch(held, [make_history(rng, 200) for _ in held])
    history = make_history(rng, 150)
    held.pop(0)
    held.pop(0)
    assert_same_state(
        model.append(model.new_state(), history), LibraryModel(recommender).append(recommender.new_state(), history)
    )


def test_scores_are_those_of_the_answers(run: Any, rng: np.random.Generator):
    model = make_model(run, 5)
    state = model.append(model.new_state(), make_history(rng, 80))
    (answer,) = model.recommend([Question(state, 30, T0 + 10**6, False)])
    scores = model.score(state, [*(item for item, _ in answer), "no such item"], T0 + 10**6)
    np.testing.assert_allclose(scores[:-1], [score for _, score in answer], rtol=1e-6)  # type: ignore[arg-type]
    assert scores[-1] is None


@pytest.mark.parametrize("own_item_bias", [True, False])
def test_an_accelerator_s_answers_are_those_given_one_by_one(
    run: Any, rng: np.random.Generator, own_item_bias: bool, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(run, int(rng.integers(2**31)), own_item_bias=own_item_bias, item_bias="learned")
    recommender = model.recommender
    torch.nn.init.normal_(recommender.network.item_bias)
    if recommender.network.own_items is not None:
        torch.nn.init.normal_(recommender.network.own_items.out.weight)
    model = LibraryModel(Recommender(run, recommender.network, TorchIndex(recommender.network.item_vectors())))
    states = [model.append(model.new_state(), make_history(rng, int(rng.integers(1, 90)))) for _ in range(6)]
    states.append(model.new_state())
    asked = [
        Question(state, int(rng.integers(1, 9)), T0 + int(rng.integers(10**5)), **kind)
        for state in states
        for kind in (
            {},
            {"exclude_seen": False},
            {"only_seen": True},
            {"exclude_seen": True, "deny": frozenset({"i1", "i2"})},
            {"allow": frozenset({"i3", "i4", "i5"})},
        )
    ]
    told = [(each.state, each.request_time, each.user) for each in asked]
    monkeypatch.setattr(recommender_module, "ROWS_ON_DEVICE", int(rng.integers(1, 200)))
    monkeypatch.setattr(ranking, "SCORED_AT_ONCE", int(rng.integers(1, 2000)))
    found = ranking.rank_on_device(model.recommender, asked, model.recommender.user_vectors(*zip(*told)))
    for question, answer in zip(asked, found, strict=True):
        (alone,) = model.recommend([question])
        assert_same_answer(answer, alone, rounding(model, question, alone))


@pytest.mark.parametrize("shape", [*SHAPES, {"max_visible_chunks": 3}], ids=str)
def test_an_explanation_adds_up_and_its_changes_are_those_of_a_pass_without_the_chunk(
    run: Any, shape: dict[str, Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attribution, "LEFT_OUT", int(rng.integers(1, 20)))
    model = make_model(run, int(rng.integers(2**31)), with_rhythm=True, **shape)
    assert model.explain(model.new_state(), [], [], "i1", None, 5) == []
    for length in (1, 5, 8 * int(rng.integers(4, 30)), int(rng.integers(100, 160))):
        history, request_time = make_history(rng, length), rng.choice([None, T0 + 50 * length + 10**5])
        state = model.append(model.new_state(), history)
        item, most = f"i{rng.integers(1, 20)}", int(rng.integers(1, 60))
        met = meetings(history, item)
        reasons = model.explain(state, history[-model.num_newest :], met, item, request_time, most)
        for layer in range(len(model.recommender.network.blocks)):
            assert sum(reason.attention_by_layer[layer] for reason in reasons) == pytest.approx(1, abs=1e-9)
        assert all(reason.attention == reason.attention_by_layer[-1] for reason in reasons)
        if shape.get("attention") != "window" and "max_visible_chunks" not in shape:
            assert sorted(n for reason in reasons for n in range(reason.first, reason.last + 1)) == list(range(length))
        changes = [reason.score_change for reason in reasons]
        told = [change for change in changes if change is not None]
        assert len(told) == min(len(reasons), max(most, attribution.LEFT_OUT))
        assert changes == [*told, *[None] * (len(reasons) - len(told))]
        assert [abs(change) for change in told] == sorted((abs(change) for change in told), reverse=True)
        has_it = {meeting.place // model.chunk_size for meeting in met}
        assert all((reason.seen_as == "counts") <= (reason.first // model.chunk_size in has_it) for reason in reasons)
        plain = MaskedHistory(model.recommender, history, request_time)
        row = model.recommender.run.items.index_of[item]
        vector = model.recommender.network.item_vectors(torch.tensor([row]))[0]
        whole = plain.user_vector()
        torch.testing.assert_close(whole, model.recommender.user_vector(state, request_time), rtol=0, atol=1e-9)
        for at in {0, len(told) - 1, *rng.integers(len(told), size=4).tolist()}:
            reason = reasons[at]
            without = plain.user_vector(reason.first // model.chunk_size, "last event")
            own = gain(model, state, history, item, request_time)
            own -= gain(model, state, history[: reason.first] + history[reason.last + 1 :], item, request_time)
            assert reason.own_item_change == pytest.approx(own, abs=1e-4)  # of scores of some tens in float32
            seen = (reason.score_change or 0.0) - reason.own_item_change
            assert seen == pytest.approx(float((whole - without) @ vector), abs=1e-9)


def meetings(history: Sequence[StoredEvent], item: str) -> list[Meeting]:
    return [Meeting(place, event.timestamp) for place, event in enumerate(history) if event.item_id == item]


def gain(model: LibraryModel, state: Any, own: Sequence[StoredEvent], item: str, request_time: int | None) -> float:
    """What an item's score gains where these events are the user's own."""
    states = [model.with_own_items(state, None, events) for events in (own, [])]
    with_own, without = (model.score(each, [item], request_time)[0] or 0.0 for each in states)
    return with_own - without


def test_an_explanation_gives_kernels_what_they_take(
    run: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    """On a CPU any strides do; a GPU's kernel takes tensors that are contiguous but for their first dimension."""

    def strict(x: torch.Tensor, gate: torch.Tensor, impl: str = "auto") -> torch.Tensor:
        assert x[0].is_contiguous()
        assert gate[0].is_contiguous()
        return sigmoid_gate(x, gate, impl=impl)

    model = make_model(run, int(rng.integers(2**31)))
    history = make_history(rng, 1200)
    state = model.append(model.new_state(), history)
    for where in ("recsys_ksa.model.block", "ksa_serving.attribution"):
        monkeypatch.setattr(f"{where}.sigmoid_gate", strict)
    item = next(item for item in model.recommender.run.items.item_id if item)
    assert model.explain(state, history[-model.num_newest :], meetings(history, item), item, None, 5)


def test_the_chunk_named_first_changes_the_score_more_than_others_when_nobody_sees_it(
    run: Any, rng: np.random.Generator
):
    """At another scale, on trained models: `serving/benchmarks/explanations.py`."""
    model = make_model(run, int(rng.integers(2**31)), layers=["summary", "summary", "summary"])
    won: list[bool] = []
    for _ in range(8):
        history = make_history(rng, int(rng.integers(60, 130)))
        state, plain = model.append(model.new_state(), history), MaskedHistory(model.recommender, history, None)
        change = torch.stack([plain.user_vector() - plain.user_vector(chunk) for chunk in range(plain.num_chunks)])
        for row in rng.integers(1, 50, 12).tolist():
            item = model.recommender.run.items.item_id[row]
            vector = model.recommender.network.item_vectors(torch.tensor([row]))[0]
            met = meetings(history, str(item))
            told = model.explain(state, history[-model.num_newest :], met, str(item), None, 5)[0]
            first = told.first // model.chunk_size
            other = int(rng.choice([chunk for chunk in range(plain.num_chunks) if chunk != first]))
            lost = {chunk: float(change[chunk] @ vector) for chunk in (first, other)}
            for chunk in lost:
                rest = [event for n, event in enumerate(history) if n // model.chunk_size != chunk]
                lost[chunk] += gain(model, state, history, str(item), None) - gain(model, state, rest, str(item), None)
            won.append(abs(lost[first]) > abs(lost[other]))
    assert np.mean(won) >= 0.9


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 130])
def test_first_rows_share_whole_segments(count: int):
    rows = SharedRows((), torch.zeros(0, 2, 1, 1)).extend(torch.arange(130.0).repeat_interleave(2).view(130, 2, 1, 1))
    cut = first_rows(rows, count)
    assert cut.num_rows == count
    torch.testing.assert_close(cut.whole(), rows.whole()[:count])
    assert all(mine is theirs for mine, theirs in zip(cut.segments, rows.segments))


@pytest.mark.parametrize("in_pages", [False, True])
def test_warming_up_changes_no_answer(run: Any, in_pages: bool):
    model = make_model(run, 0, in_pages=in_pages)
    state = model.append(model.new_state(), make_history(np.random.default_rng(1), 30))
    before = model.recommend([Question(state, 5, None)])
    model.warm_up(4)
    assert model.recommend([Question(state, 5, None)]) == before
    pool = model.recommender.pool
    if pool is not None:
        held = pool.num_free
        model.warm_up(4)
        assert pool.num_free == held
