"""What `serving/benchmarks/parity.py` counts as a failure, and that it finds mistakes of states kept up to date."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksa_serving.library_model import LibraryModel
from recsys_ksa.model import few_events
from recsys_ksa.model.state import UserState
from recsys_ksa.run import open_run
from recsys_ksa.testing import random_run

BENCHMARKS = Path(__file__).parents[2] / "serving" / "benchmarks"
NUM_HISTORIES = 10
WAYS = {"arrivals", "late", "arrivals after a late event", "cold"}


@pytest.fixture(scope="module")
def parity() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):  # a benchmark sets them
            patch.setenv(name, "1")
        patch.syspath_prepend(BENCHMARKS)
        import parity  # pyright: ignore[reportMissingImports]

        yield parity
        for name in ("parity", "reference"):
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, parity: Any) -> Any:
    return open_run(random_run(tmp_path_factory.mktemp("runs") / "run", parity.NUM_ITEMS))


@pytest.fixture
def found(parity: Any, run: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> Any:
    """Return a function that compares states of a few histories in networks of one shape."""
    monkeypatch.setattr(parity, "NUM_EARLY", 3)
    monkeypatch.setattr(parity, "NUM_LATE", 3)

    def compare(shape: dict[str, Any]) -> Any:
        monkeypatch.setattr(parity, "SHAPES", [shape])
        return parity.compare(run, seed, num_histories=NUM_HISTORIES)

    return compare


def wrong_ways(found: Any) -> set[str]:
    return {mistake.split(":")[0] for mistake in found.wrong}


@pytest.mark.parametrize("number", range(8))
def test_states_kept_up_to_date_are_those_of_one_pass(parity: Any, found: Any, number: int):
    assert len(parity.SHAPES) == 8
    result = found(parity.SHAPES[number])
    assert result.wrong == []
    assert result.ways.total() >= 3 * NUM_HISTORIES


def test_every_way_is_compared(found: Any):
    assert set(found({}).ways) == WAYS


def test_an_attention_that_is_a_little_too_large_is_found(found: Any, monkeypatch: pytest.MonkeyPatch):
    attend = few_events.attend
    monkeypatch.setattr(few_events, "attend", lambda *given: attend(*given) * np.float32(1.0003))
    assert "arrivals" in wrong_ways(found({}))


def test_rounded_cold_rows_are_found(parity: Any, found: Any, monkeypatch: pytest.MonkeyPatch):
    make_model = parity.make_model
    monkeypatch.setattr(parity, "make_model", lambda *given: LibraryModel(make_model(*given).recommender, "int8"))
    result = found({})
    assert "cold" in wrong_ways(result)
    assert all("rows differ" in mistake for mistake in result.wrong)


def test_own_items_without_the_late_ones_are_found(found: Any, monkeypatch: pytest.MonkeyPatch):
    def forgetful(self: LibraryModel, state: UserState, before: UserState, added: Any) -> UserState:
        return replace(state, seen=before.seen, num_unknown=before.num_unknown)

    monkeypatch.setattr(LibraryModel, "with_own_items", forgetful)
    result = found({})
    assert {"late", "arrivals after a late event"} <= wrong_ways(result)
    assert "rows differ by inf" in result.wrong[0]


def test_answers_are_asked_of_the_states_that_were_led(found: Any, monkeypatch: pytest.MonkeyPatch):
    append_few = few_events.append_few

    def with_another_input(*given: Any) -> list[Any]:  # which rows do not tell
        return [replace(memory, last_input=-memory.last_input) for memory in append_few(*given)]

    monkeypatch.setattr(few_events, "append_few", with_another_input)
    result = found({})
    assert result.wrong
    assert all("other answers" in mistake for mistake in result.wrong)


def test_a_batch_has_one_state_of_a_history_at_most(parity: Any, found: Any, monkeypatch: pytest.MonkeyPatch):
    append_batch, make_history, sizes = LibraryModel.append_batch, parity.make_history, []
    histories: list[list[Any]] = []
    owner: dict[int, int] = {}

    def known(*given: Any) -> list[Any]:
        histories.append(make_history(*given))
        owner.update((id(event), len(histories)) for event in histories[-1])
        return histories[-1]

    def watched(self: LibraryModel, states: Any, events: Any) -> Any:
        sizes.append(len(states))
        assert len({owner[id(given[0])] for given in events}) == len(events)
        return append_batch(self, states, events)

    monkeypatch.setattr(parity, "make_history", known)
    monkeypatch.setattr(LibraryModel, "append_batch", watched)
    found({})
    assert max(sizes) > 1


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ([("a", 3.0), ("b", 2.0), ("c", 1.0)], True),
        ([("a", 3.00002), ("b", 2.0), ("c", 1.0)], True),  # within 1e-5 of the largest
        ([("a", 3.00004), ("b", 2.0), ("c", 1.0)], False),
        ([("b", 3.0), ("a", 2.0), ("c", 1.0)], False),
        ([("a", 3.0), ("b", 2.0), ("d", 1.0)], True),  # may be a tie with the last
        ([("a", 3.0), ("d", 2.0), ("c", 1.0)], False),
        ([("a", 3.0), ("b", 2.0)], False),
        ([], False),
    ],
)
def test_answers_are_the_same_but_for_near_ties(parity: Any, answer: list[tuple[str, float]], same: bool):
    assert parity.same_answers(answer, [("a", 3.0), ("b", 2.0), ("c", 1.0)]) is same


def test_near_ties_may_change_places(parity: Any):
    assert parity.same_answers([("b", 3.0), ("a", 3.0)], [("a", 3.00001), ("b", 3.0)])
    assert parity.same_answers([], [])


def test_a_mistake_is_told_with_the_seed_that_replays_it(
    parity: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def two(path: Path, seeds: Any, workers: int) -> Any:
        assert workers == 3
        for seed in seeds:
            yield parity.Found(seed, parity.Counter(late=2), ["late: other answers"] if seed == 8 else [])

    monkeypatch.setattr(parity, "compare_all", two)
    monkeypatch.setattr(sys, "argv", ["parity.py", "--seed", "7", "--networks", "2", "--workers", "3"])
    with pytest.raises(SystemExit) as ended:
        parity.main()
    assert ended.value.code == 1
    told = capsys.readouterr().out
    assert "--seed 8 --networks 1: late: other answers" in told
    assert "4 comparisons (late 4) of 2 networks" in told
