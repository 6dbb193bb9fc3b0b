import numpy as np
import pytest
import torch

from recsys_ksa.evaluate.metrics import Pairs, question_metrics, target_ranks, user_means


def ranks_of(scores, targets: list[set[int]], owned: list[set[int]]) -> tuple[list[int], list[int]]:
    def pairs(sets: list[set[int]]) -> Pairs:
        flat = [(question, item) for question, items in enumerate(sets) for item in sorted(items)]
        table = torch.tensor(flat, dtype=torch.int64).reshape(-1, 2)
        return Pairs(table[:, 0].contiguous(), table[:, 1].contiguous())

    is_owned = torch.tensor([item in owned[q] for q, items in enumerate(targets) for item in sorted(items)], dtype=bool)
    ranks, list_ranks = target_ranks(torch.tensor(scores, dtype=torch.float32), pairs(targets), pairs(owned), is_owned)
    return ranks.tolist(), list_ranks.tolist()


def naive_rank(scores: list[float], target: int, targets: set[int], among: set[int]) -> int:
    """Sort worst luck first: at equal scores strangers, then targets in order."""
    rank = 1
    for item in among - {target}:
        if item in targets:
            rank += scores[item] > scores[target] or (scores[item] == scores[target] and item < target)
        else:
            rank += scores[item] >= scores[target]
    return rank


def test_metrics_equal_a_hand_worked_table():
    # Question 0: one target, third. Question 1: two targets, first and eleventh. Question 2: twelve targets, all first.
    # Question 3 has a target at rank 11 only.
    rank = np.array([3, 1, 11, *range(1, 13), 11])
    question = np.array([0, 1, 1, *[2] * 12, 3])
    found = question_metrics(rank, question, 5)
    assert found["hr@10"][:4].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert found["recall@10"][:4].tolist() == pytest.approx([1.0, 0.5, 10 / 12, 0.0])
    assert found["mrr"][:4].tolist() == pytest.approx([1 / 3, 1.0, 1.0, 1 / 11])
    # 1 / log2(4); 1 of an ideal 1 + 1 / log2(3); whole; nothing.
    assert found["ndcg@10"][:4].tolist() == pytest.approx([0.5, 1 / (1 + 1 / np.log2(3)), 1.0, 0.0])
    assert all(np.isnan(values[4]) for values in found.values())


def test_targets_left_out_count_neither_as_hits_nor_in_the_ideal():
    found = question_metrics(np.array([1, 2]), np.array([0, 0]), 1, kept=np.array([False, True]))
    assert found["recall@10"][0] == 1.0
    assert found["mrr"][0] == 0.5
    assert found["ndcg@10"][0] == pytest.approx(1 / np.log2(3))


def test_ties_count_against_the_model_and_the_padding_item_is_never_ranked():
    ranks, _ = ranks_of([[99.0, 1.0, 1.0, 1.0, 0.0]], [{2}], [set()])
    assert ranks == [3]


def test_tied_targets_of_one_question_take_turns():
    ranks, _ = ranks_of([[0.0, 1.0, 1.0, 1.0, 0.0]], [{1, 3}], [set()])
    assert sorted(ranks) == [2, 3]


def test_a_model_of_nan_ranks_last():
    ranks, _ = ranks_of([[0.0, np.nan, 5.0, 4.0], [0.0, np.nan, 5.0, 4.0]], [{1}, {2}], [set(), set()])
    assert ranks == [3, 2]


def test_an_unknown_target_is_never_found():
    ranks, list_ranks = ranks_of([[99.0, 1.0, 2.0]], [{0}], [set()])
    assert ranks == list_ranks == [3]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_a_slow_count_among_all_items_and_in_the_own_list(seed):
    rng = np.random.default_rng(seed)
    questions, items = 6, 15
    # Few distinct scores, some of them -inf as a seen filter leaves them: many ties.
    scores = rng.choice([-np.inf, 0.0, 0.5, 1.0, 2.0], size=(questions, items + 1)).astype(np.float32)
    draw = lambda most: set(rng.choice(np.arange(1, items + 1), rng.integers(0, most), replace=False).tolist())  # noqa: E731
    targets, owned = [draw(5) for _ in range(questions)], [draw(8) for _ in range(questions)]
    ranks, list_ranks = ranks_of(scores, targets, owned)
    every = set(range(1, items + 1))
    expected, expected_list = [], []
    for row, target_set, own in zip(scores.tolist(), targets, owned):
        for target in sorted(target_set):
            expected.append(naive_rank(row, target, target_set, every))
            among = own if target in own else every - own
            expected_list.append(naive_rank(row, target, target_set & among, among))
    # Equal targets may take turns in any order.
    assert sorted(ranks) == sorted(expected)
    assert sorted(list_ranks) == sorted(expected_list)


def test_a_user_weighs_one_whatever_the_number_of_questions():
    value = np.array([1.0, 0.0, np.nan, 1.0])
    means = user_means(value, np.array([0, 0, 0, 1]), 3)
    assert means[:2].tolist() == [0.5, 1.0]
    assert np.isnan(means[2])
