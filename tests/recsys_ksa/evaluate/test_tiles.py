import numpy as np
import pytest
import torch

from recsys_ksa.evaluate import metrics, tiles
from recsys_ksa.evaluate.metrics import Pairs, target_ranks
from recsys_ksa.evaluate.ranking import MAX_SCORES, chunks
from recsys_ksa.evaluate.tiles import BLOCK, stream_top_k, top_k


@pytest.mark.parametrize("ties", [False, True])
def test_blocks_find_what_topk_finds(ties, rng):
    """Random widths around whole blocks; with many equal scores the values are the same and belong to the columns."""
    for _ in range(20):
        columns, k = int(rng.integers(1, 40 * BLOCK)), int(rng.integers(1, 13))
        scores = torch.from_numpy(rng.normal(size=(7, columns)).astype(np.float32))
        if ties:
            scores = scores.round()
        scores[rng.random(7) < 0.3] = -torch.inf
        k = min(k, columns)
        value, index = top_k(scores, k)
        assert torch.equal(value, scores.topk(k, dim=1).values)
        assert torch.equal(scores.gather(1, index), value)
        assert all(len(set(row)) == k for row in index.tolist())


def test_tiles_find_what_the_whole_table_holds(rng):
    """Whole numbers: products are exact in any shape, so values are equal to the last bit."""
    for _ in range(10):
        users = torch.from_numpy(rng.integers(-9, 10, (int(rng.integers(1, 40)), 6)).astype(np.float32))
        items = torch.from_numpy(rng.integers(-9, 10, (int(rng.integers(12, 3000)), 6)).astype(np.float32))
        tile = int(rng.integers(1, 700))
        value, index = stream_top_k(users, items, 12, max_scores=int(rng.integers(1, 5000)), tile_items=tile)
        whole = users @ items.T
        assert torch.equal(value, whole.topk(12, dim=1).values)
        assert torch.equal(whole.gather(1, index), value)
        assert all(len(set(row)) == 12 for row in index.tolist())


def test_no_tile_is_larger_than_allowed(rng, monkeypatch):
    seen = []
    plain = tiles.top_k
    monkeypatch.setattr(tiles, "top_k", lambda scores, k: (seen.append(scores.numel()), plain(scores, k))[1])
    users, items = torch.randn(100, 4), torch.randn(1000, 4)
    stream_top_k(users, items, 5, max_scores=3000, tile_items=64)
    assert max(seen) <= 3000
    assert sum(seen) == 100 * 1000


def test_a_chunk_of_questions_bounds_the_scores_held(rng, random_histories):
    from recsys_ksa.evaluate.protocol import ask

    questions = ask(random_histories(rng, users=300), "global")
    for items in (10, 10**5, 10**6, 10**8):
        parts = list(chunks(questions, items))
        assert sum(len(part) for part in parts) == len(questions)
        assert all(len(part) * (items + 1) <= max(MAX_SCORES, items + 1) for part in parts)


@pytest.mark.parametrize("nan_share", [0.0, 0.02, 0.3])
def test_counting_and_sorting_give_the_same_ranks(nan_share, rng, monkeypatch):
    scores = torch.from_numpy(rng.integers(0, 6, (30, 60)).astype(np.float32))
    scores[torch.from_numpy(rng.random((30, 60)) < nan_share)] = torch.nan
    question = np.sort(rng.integers(0, 30, 50))
    pairs = np.unique(np.stack((question, rng.integers(0, 60, 50)), axis=1), axis=0)
    targets = Pairs(torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1]))
    owned = Pairs(targets.question[::3], targets.item[::3].clamp(min=1))
    is_owned = torch.arange(len(pairs)) % 3 == 0
    found = []
    for few in (0, 100):
        monkeypatch.setattr(metrics, "FEW_TARGETS", few)
        found.append(target_ranks(scores, targets, owned, is_owned))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds(rng):
    """Whole numbers: equal to the last bit, tiles and ranks."""
    users = torch.from_numpy(rng.integers(-9, 10, (50, 8)).astype(np.float32))
    items = torch.from_numpy(rng.integers(-9, 10, (5000, 8)).astype(np.float32))
    value, _ = stream_top_k(users.cuda(), items.cuda(), 10, tile_items=700)
    assert torch.equal(value.cpu(), stream_top_k(users, items, 10)[0])
    scores = users @ items.T
    question = torch.arange(50)
    targets = Pairs(question, torch.from_numpy(rng.integers(1, 5000, 50)))
    owned = Pairs(question, targets.item)
    found = []
    for device in ("cpu", "cuda"):
        pairs = [Pairs(pair.question.to(device), pair.item.to(device)) for pair in (targets, owned)]
        mine = torch.ones(50, dtype=torch.bool, device=device)
        found.append([ranks.cpu() for ranks in target_ranks(scores.to(device), *pairs, mine)])
    assert all(torch.equal(one, other) for one, other in zip(*found))
