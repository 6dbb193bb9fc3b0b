"""Planted leaks: each must change nothing, or be seen."""

import dataclasses

import numpy as np
import pytest
import torch

from recsys_ksa.config import ModelConfig
from recsys_ksa.evaluate.baselines import NAMES, baselines
from recsys_ksa.evaluate.metrics import question_metrics
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import Questions, ask
from recsys_ksa.evaluate.ranking import rank_targets
from recsys_ksa.evaluate.slices import slices

ITEMS = 12
CONFIG = ModelConfig(chunk_size=2, window_chunks=1, layers=("summary", "summary"))


class Constant:
    """Scores that favour given items."""

    name, request_time = "constant", None

    def __init__(self, *best: int) -> None:
        self.best = best

    def scores(self, questions: Questions) -> torch.Tensor:
        scores = torch.zeros(len(questions), ITEMS + 1)
        for place, item in enumerate(self.best):
            scores[:, item] = len(self.best) - place
        return scores


@pytest.mark.parametrize("protocol", ["loo", "loo-classic", "global"])
def test_no_baseline_sees_a_questions_targets_or_later(protocol, rng, random_histories, make_dataset):
    """Other items in place of the targets, and of all that comes after the first of them, leave scores as they are."""
    histories = random_histories(rng)
    questions = ask(histories, protocol)
    changed = np.array(histories.item_index)
    if protocol == "global":
        chosen = int(questions.timestamp.min())
        hidden = np.asarray(histories.timestamp) >= chosen
    else:
        position = np.arange(histories.num_events) - np.repeat(histories.offsets[:-1], histories.lengths)
        first = np.full(histories.num_users, histories.num_events)
        first[questions.user] = questions.cut
        hidden = position >= np.repeat(first, histories.lengths)
        chosen = None
    changed[hidden] = changed[hidden] % ITEMS + 1
    altered = dataclasses.replace(histories, item_index=changed)
    asked = questions if chosen is None else questions.of_users(_users_first_asked(questions, chosen))
    asked = asked if chosen is None else asked.slice(0, 1)
    before, after = (
        baselines(
            make_dataset(table), protocol, Ownership(table), exclude_seen=False,
            names=[name for name in NAMES if name != "personal-frequency-decayed"],
        )[0]
        for table in (histories, altered)
    )  # fmt: skip
    for scorer, other in zip(before, after):
        assert torch.equal(scorer.scores(asked), other.scores(asked)), scorer.name


def _users_first_asked(questions: Questions, time: int) -> np.ndarray:
    keep = np.zeros(int(questions.user.max()) + 1, dtype=bool)
    keep[questions.user[questions.timestamp == time][:1]] = True
    return keep


@pytest.mark.parametrize("protocol", ["loo", "global"])
def test_the_order_inside_a_tie_tells_nothing(protocol, rng, random_histories):
    """Baskets sorted by id, the trap of complete-journey: questions are the same in any order of ties."""
    histories = random_histories(rng)
    user = np.repeat(np.arange(histories.num_users), histories.lengths)
    found = []
    for tie in (histories.item_index, -histories.item_index, rng.random(histories.num_events)):
        order = np.lexsort((tie, histories.timestamp, user))
        table = dataclasses.replace(histories, item_index=histories.item_index[order])
        questions = ask(table, protocol)
        had = Ownership(table).before(questions)
        pairs = sorted(zip(had.question.tolist(), had.item.tolist(), had.count.tolist(), had.last.tolist()))
        found.append((questions.cut.tolist(), questions.target_item.tolist(), pairs))
    assert found[0] == found[1] == found[2]


def test_a_seen_filter_takes_away_what_the_user_had_but_never_a_target(make_histories):
    histories = make_histories([[(1, 0), (2, 10), (3, 20), (2, 30)]])
    questions = ask(histories, "loo")
    ownership = Ownership(histories)
    scorer = Constant(1, 3, 2)
    (plain,), distance = rank_targets([scorer], questions, ownership, ITEMS, exclude_seen=False)
    (filtered,), _ = rank_targets([scorer], questions, ownership, ITEMS, exclude_seen=True)
    assert distance.tolist() == [2]
    assert plain.all_items.tolist() == [3]
    # Items 1 and 3 are gone, item 2 stays although the user had it.
    assert filtered.all_items.tolist() == [1]


def test_a_set_question_splits_into_its_new_and_repeated_targets(make_histories):
    histories = make_histories([[(1, 0), (2, 10), (3, 20), (4, 20), (1, 20)]])
    questions = ask(histories, "loo")
    (ranks,), distance = rank_targets([Constant(1, 2, 4)], questions, Ownership(histories), ITEMS, exclude_seen=False)
    assert distance.tolist() == [2, 0, 0]
    value = {}
    for part in slices(questions, distance, CONFIG, exclude_seen=False):
        rank = ranks.own_list if part.in_list else ranks.all_items
        value[part.name] = question_metrics(rank, questions.target_question, 1, part.kept)
    assert value["repeat"]["mrr"][0] == 1.0
    # Item 4 stands third among all items and first among those the user never had.
    assert value["new"]["mrr"][0] == 1.0
    together = [part for part in slices(questions, distance, CONFIG, exclude_seen=True) if part.name == "new"]
    assert not together[0].in_list
    assert value["all"]["recall@10"][0] == pytest.approx(2 / 3)


def test_slices_by_gap_are_for_tie_ordered_questions_only(make_histories):
    histories = make_histories([[(1, 0), (2, 10), (3, 10)], [(1, 0), (2, 10), (3, 20)]])
    for protocol, has_gaps in (("loo", False), ("loo-classic", True)):
        questions = ask(histories, protocol)
        distance = np.zeros(len(questions.target_item), dtype=np.int64)
        names = {part.name for part in slices(questions, distance, CONFIG, exclude_seen=False)}
        assert ("gap-0" in names) == has_gaps
        assert "length-0-15" in names
        assert "repeat" not in names
