"""Leaks planted on purpose: what guards against each must see it, and must see nothing in honest code."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_ksa.data.dataset import Histories, open_dataset
from recsys_ksa.errors import ProtocolError
from recsys_ksa.evaluate.baselines import PersonalFrequency, Popularity
from recsys_ksa.evaluate.ksa_scorer import run_scorers
from recsys_ksa.evaluate.metrics import question_metrics
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import Questions, ask, check_honest
from recsys_ksa.evaluate.ranking import Chunk, rank_targets
from recsys_ksa.recommender import Recommender
from recsys_ksa.testing import DAY, START, prepared_dataset


def without_the_future(histories: Histories, questions: Questions, num_items: int) -> Histories:
    """Other items in place of each user's targets and all that follows."""
    position = np.arange(histories.num_events) - np.repeat(histories.offsets[:-1], histories.lengths)
    first = np.full(histories.num_users, histories.num_events)
    np.minimum.at(first, questions.user, questions.cut)
    hidden = position >= np.repeat(first, histories.lengths)
    item = np.array(histories.item_index)
    item[hidden] = item[hidden] % num_items + 1
    return dataclasses.replace(histories, item_index=item)


def peeking(questions: Questions) -> Questions:
    """The leak: one event more is known than was."""
    return dataclasses.replace(questions, cut=questions.cut + 1)


@pytest.mark.parametrize("leak", [False, True])
def test_a_network_that_reads_a_future_event_is_caught(leak, tiny_data, tiny_run):
    dataset, network = open_dataset(tiny_data), Recommender.load(tiny_run).network
    honest = ask(dataset.histories, "loo")
    shown = peeking(honest) if leak else honest
    found = []
    for histories in (dataset.histories, without_the_future(dataset.histories, honest, dataset.num_items - 1)):
        table = dataclasses.replace(dataset, histories=histories)
        (scorer,) = run_scorers("ksa", network, table, shown, Ownership(histories), ["none"])
        found.append(scorer.scores(shown))
    assert torch.equal(*found) is not leak


@pytest.mark.parametrize("leak", [False, True])
def test_a_count_that_holds_a_future_event_is_caught(leak, tiny_data):
    dataset = open_dataset(tiny_data)
    honest = ask(dataset.histories, "loo")
    shown = peeking(honest) if leak else honest
    found = []
    for histories in (dataset.histories, without_the_future(dataset.histories, honest, dataset.num_items - 1)):
        popularity = Popularity("popularity", histories, dataset.num_items - 1, "loo", None)
        found.append(PersonalFrequency(Ownership(histories), popularity).scores(shown))
    assert torch.equal(*found) is not leak


class BiggerId:
    """The leak: the source lists a basket by item id, so the next line is the next bigger id."""

    name, request_time = "bigger-id", None

    def __init__(self, histories: Histories, num_items: int) -> None:
        self.histories, self.num_items = histories, num_items

    def scores(self, questions: Questions) -> torch.Tensor:
        last = self.histories.item_index[self.histories.offsets[questions.user] + questions.cut - 1].astype(np.int64)
        step = np.arange(self.num_items + 1) - last[:, None]
        return torch.from_numpy(np.where(step > 0, -step, -self.num_items - np.abs(step)).astype(np.float32))


def test_ties_sorted_by_id_are_caught(rng, tmp_path):
    """Random baskets, sorted: under `loo-classic` a rule that knows nothing of users wins; so it is refused, and under
    `loo` the rule is worth no more than chance."""
    users, baskets, size, items = 250, 5, 6, 120  # few users' hits lie below the bound by chance
    rows = [(user, basket, item) for user in range(users) for basket in range(baskets)
            for item in sorted(rng.choice(np.arange(1000, 1000 + items), size, replace=False).tolist())]  # fmt: skip
    log = pa.table({
        "user_id": [f"u{user}" for user, _, _ in rows],
        "item_id": [str(item) for _, _, item in rows],
        "timestamp": [START + (user % 7) * DAY + basket * 9 * DAY for user, basket, _ in rows],
    })  # fmt: skip
    dataset = prepared_dataset(tmp_path, log, arguments=["--tie", "arrival"])
    assert dataset.manifest.tie_audit.is_artefact
    assert dataset.manifest.tie_audit.next_id_greater == 1.0
    with pytest.raises(ProtocolError, match="the source sorted its ties"):
        check_honest(dataset, "loo-classic", "any")
    # Numbers by the ids' order, as the rule needs them; items are numbered by first sight.
    order = np.argsort(np.argsort([int(item) for item in dataset.items.item_id[1:]])) + 1
    histories = dataclasses.replace(
        dataset.histories, item_index=np.append(0, order)[dataset.histories.item_index].astype(np.int32)
    )
    hits = {}
    for protocol in ("loo-classic", "loo"):
        questions = ask(histories, protocol)
        scorer = BiggerId(histories, dataset.num_items - 1)
        (ranks,), _ = rank_targets([scorer], questions, Ownership(histories), dataset.num_items - 1, exclude_seen=False)
        values = question_metrics(ranks.all_items, questions.target_question, len(questions))
        hits[protocol] = values["recall@10"].mean()
    chance = 10 / items
    assert hits["loo-classic"] > 3 * chance
    assert hits["loo"] < 1.6 * chance
    (tmp_path / "again").mkdir()
    assert prepared_dataset(tmp_path / "again", log).manifest.tie == "hash"


@pytest.mark.parametrize("leak", [False, True])
def test_a_seen_filter_that_is_off_is_caught(leak, tiny_data, tiny_run, monkeypatch):
    """No list holds what the user had, targets excepted; with the filter switched off behind its back, some do."""
    if leak:
        monkeypatch.setattr(Chunk, "scores", lambda chunk, scorer, *, exclude_seen: scorer.scores(chunk.questions))
    dataset, network = open_dataset(tiny_data), Recommender.load(tiny_run).network
    questions, ownership = ask(dataset.histories, "loo"), Ownership(dataset.histories)
    scorers = run_scorers("ksa", network, dataset, questions, ownership, ["none"])
    (ranks,), distance = rank_targets(scorers, questions, ownership, dataset.num_items - 1, exclude_seen=True)
    had = ownership.before(questions)
    seen = set(zip(had.question.tolist(), had.item.tolist()))
    seen -= set(zip(questions.target_question.tolist(), questions.target_item.tolist()))
    listed = {(q, item) for q in range(len(questions)) for item in ranks.top[q].tolist() if item}
    assert bool(listed & seen) is leak
    assert np.any(distance > 0)
