import numpy as np
import pytest
import torch

from recsys_ksa.config import ModelConfig
from recsys_ksa.evaluate.lists import ListMetrics
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import ask, held_out_start
from recsys_ksa.evaluate.ranking import first_items
from recsys_ksa.evaluate.slices import slices

ITEMS = 12


@pytest.mark.parametrize("protocol", ["loo", "global"])
def test_list_metrics_equal_a_slow_count(protocol, rng, random_histories):
    histories = random_histories(rng)
    questions = ask(histories, protocol)
    top = np.stack([rng.permutation(np.arange(1, ITEMS + 1))[:10] for _ in range(len(questions))]).astype(np.int32)
    top[rng.random(top.shape) < 0.2] = 0
    top[0] = 0
    lists = ListMetrics(histories, ITEMS, protocol)
    found = lists.of_questions(top, questions)
    count = dict.fromkeys(range(1, ITEMS + 1), 1)
    for user, end in enumerate(held_out_start(histories, protocol)):
        for item in histories.item_index[histories.rows(user)][:end].tolist():
            count[item] += 1
    total = sum(count.values())
    for q in range(len(questions)):
        listed = [item for item in top[q].tolist() if item]
        novelty, bias = found["novelty@10"][q], found["popularity-bias@10"][q]
        if not listed:
            assert np.isnan(novelty)
            assert np.isnan(bias)
            continue
        assert novelty == pytest.approx(np.mean([-np.log2(count[item] / total) for item in listed]))
        known = histories.item_index[histories.rows(int(questions.user[q]))][: questions.cut[q]].tolist()
        if known:
            expected = np.log2(np.mean([count[item] for item in listed]) / np.mean([count[item] for item in known]))
            assert bias == pytest.approx(expected)
        else:
            assert np.isnan(bias)
    assert lists.coverage(top) == len({item for item in top.ravel().tolist() if item}) / ITEMS


def test_first_items_leave_out_what_has_no_score():
    scores = torch.full((2, 16), -torch.inf)
    scores[0, [4, 2, 9]] = torch.tensor([1.0, 3.0, 2.0])
    scores[1, 1:] = torch.arange(15.0)
    scores[:, 0] = 100.0
    assert first_items(scores).tolist() == [[2, 9, 4, *[0] * 7], list(range(15, 5, -1))]
    assert first_items(scores[:, :4]).tolist()[1] == [3, 2, 1, *[0] * 7]


@pytest.mark.parametrize("protocol", ["loo", "loo-classic", "global"])
def test_how_long_ago_a_target_was_last_met_equals_a_slow_search(protocol, rng, random_histories):
    histories = random_histories(rng)
    questions = ask(histories, protocol)
    found = Ownership(histories).last_met(questions)
    config = ModelConfig(chunk_size=3, window_chunks=1, layers=("summary", "summary"))
    kept = {part.name: part.kept for part in slices(questions, found, config, exclude_seen=False)}
    for target, (q, item) in enumerate(zip(questions.target_question.tolist(), questions.target_item.tolist())):
        cut = int(questions.cut[q])
        known = histories.item_index[histories.rows(int(questions.user[q]))][:cut].tolist()
        expected = next((ago for ago in range(1, cut + 1) if known[cut - ago] == item), 0)
        assert found[target] == expected
        now, then = (cut - 1) // 3, (cut - expected) // 3
        where = ("never" if not expected else "window" if now - then <= 1
                 else "stacked-window" if now - then <= 2 else "beyond")  # fmt: skip
        held = {name for name, mask in kept.items() if name.startswith("distance-") and mask[target]}
        assert held == {f"distance-{where}"}


def test_an_unknown_target_was_never_met(make_histories):
    histories = make_histories([[(0, 0), (1, 10), (0, 20)], [(1, 0), (2, 10), (3, 20)]])
    assert Ownership(histories).last_met(ask(histories, "loo")).tolist() == [0, 0]
