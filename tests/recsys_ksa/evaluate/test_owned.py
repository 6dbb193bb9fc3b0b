import numpy as np
import pytest

from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import ask


@pytest.mark.parametrize("from_start", [False, True])
def test_owned_items_equal_a_slow_count(from_start, rng, random_histories):
    histories = random_histories(rng)
    questions = ask(histories, "global")
    start = questions.cut // 2 if from_start else None
    owned = Ownership(histories).before(questions, start)
    found = set(zip(*(part.tolist() for part in (owned.question, owned.item, owned.count, owned.first, owned.last))))
    expected = set()
    for q in range(len(questions)):
        base = int(histories.offsets[questions.user[q]])
        rows = range(base + (int(start[q]) if from_start else 0), base + int(questions.cut[q]))
        for item in {int(histories.item_index[row]) for row in rows}:
            times = [int(histories.timestamp[row]) for row in rows if histories.item_index[row] == item]
            expected.add((q, item, len(times), times[0], times[-1]))
    assert found == expected
    assert len(found) == len(owned.item)
    assert np.all(np.diff(owned.question) >= 0)


def test_decayed_counts_equal_a_slow_sum(rng, random_histories):
    histories = random_histories(rng)
    half_life = 3.5 * 86_400
    found = Ownership(histories).decayed_log_count(half_life)
    for user in range(histories.num_users):
        rows = range(histories.offsets[user], histories.offsets[user + 1])
        for row in rows:
            same = [r for r in rows if r <= row and histories.item_index[r] == histories.item_index[row]]
            total = sum(2.0 ** (-(histories.timestamp[row] - histories.timestamp[r]) / half_life) for r in same)
            assert found[row] == pytest.approx(np.log2(total))


def test_unknown_items_are_owned_by_nobody(make_histories):
    histories = make_histories([[(0, 0), (1, 5), (2, 9)]])
    owned = Ownership(histories).before(ask(histories, "loo"))
    assert owned.item.tolist() == [1]
