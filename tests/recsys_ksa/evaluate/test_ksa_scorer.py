import numpy as np
import pytest
import torch

from recsys_ksa.data.assemble import questions_batch, span_start
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.evaluate.ksa_scorer import run_scorers, user_vectors, window_events
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import ask, request_times
from recsys_ksa.model.network import Network
from recsys_ksa.recommender import Recommender

VARIANTS = ("target", "drawn", "none")


@pytest.fixture(scope="module")
def dataset(tiny_data):
    return open_dataset(tiny_data)


@pytest.fixture(scope="module")
def recommender(tiny_run):
    return Recommender.load(tiny_run)


@pytest.fixture(scope="module")
def questions(dataset):
    return ask(dataset.histories, "global")


@pytest.fixture(scope="module")
def ownership(dataset):
    return Ownership(dataset.histories)


def scores_by_variant(dataset, recommender, questions, ownership, **options) -> dict[str, torch.Tensor]:
    scorers = run_scorers("ksa", recommender.network, dataset, questions, ownership, VARIANTS, **options)
    return {scorer.request_time: scorer.scores(questions) for scorer in scorers}


def test_scores_equal_what_the_service_answers_for_the_same_events(dataset, recommender, questions, ownership):
    """One pass over whole histories, all questions of a user at once, against appended states."""
    scores = scores_by_variant(dataset, recommender, questions, ownership)
    items, types = dataset.items.item_id, dataset.vocab.get("event_type")
    histories = dataset.histories
    ids = histories.user_ids()
    times = {variant: request_times(questions, variant, ids) for variant in VARIANTS}
    for q in range(0, len(questions), max(1, len(questions) // 6)):
        rows = slice(histories.offsets[questions.user[q]], histories.offsets[questions.user[q]] + int(questions.cut[q]))
        state = recommender.append(
            recommender.new_state(),
            [items[index] for index in histories.item_index[rows]],
            histories.timestamp[rows].tolist(),
            None if types is None else [types[index] for index in histories.event_type[rows]],
        )
        for variant, (now, shown) in times.items():
            answer = dict(recommender.recommend(state, len(items), int(now[q]) if shown[q] else None, False))
            expected = torch.tensor([answer[item] for item in items[1:]])
            torch.testing.assert_close(scores[variant][q, 1:], expected, rtol=1e-4, atol=1e-4)


def test_user_vectors_equal_the_networks_forward_pass(dataset, recommender, questions, ownership):
    network = recommender.network
    scorers = run_scorers("ksa", network, dataset, questions, ownership, VARIANTS)
    users, question_user = np.unique(questions.user, return_inverse=True)
    for scorer in scorers:
        times = None if scorer.request_time == "none" else scorer.now
        batch = questions_batch(
            dataset.histories, users, question_user, questions.cut, times, chunk_size=network.config.chunk_size
        )
        with torch.no_grad():
            torch.testing.assert_close(scorer.vectors, network(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"max_visible_chunks": 1}, {"layers": ("full", "full")}, {"attention": "window"}])
def test_only_the_events_that_ask_are_computed_and_nothing_changes(change, dataset, recommender):
    """Users with an early question, a late one, none known, and no event: against the plain forward pass."""
    config = recommender.network.config.model_copy(update={**change, "window_chunks": 1})
    network = Network(config, recommender.network.features).eval()
    cuts = np.minimum(np.array([0, 3, 40, 33, 0, 8]), dataset.histories.lengths[[0, 0, 0, 1, 2, 3]])
    times = np.arange(6) * 10**6 + int(dataset.histories.timestamp.max())
    question_user = np.array([0, 0, 0, 1, 2, 3])
    batch = questions_batch(dataset.histories, np.arange(4), question_user, cuts, times, chunk_size=config.chunk_size)
    (found,) = user_vectors(network, batch, batch.request_bucket[None].numpy())
    with torch.no_grad():
        torch.testing.assert_close(found, network(batch), rtol=1e-4, atol=1e-4)


def test_scores_do_not_depend_on_the_batch(dataset, recommender, questions, ownership, monkeypatch):
    whole = scores_by_variant(dataset, recommender, questions, ownership)
    monkeypatch.setattr("recsys_ksa.evaluate.ksa_scorer.BATCH_EVENTS", 40)
    small = scores_by_variant(dataset, recommender, questions, ownership)
    for variant in VARIANTS:
        torch.testing.assert_close(whole[variant], small[variant], rtol=1e-4, atol=1e-4)


def test_truncated_sees_the_window_only_and_equals_the_whole_where_the_window_holds_all(
    dataset, recommender, questions, ownership
):
    config = recommender.network.config
    window = window_events(config)
    whole = scores_by_variant(dataset, recommender, questions, ownership)["none"]
    cut = scores_by_variant(dataset, recommender, questions, ownership, max_length=window)["none"]
    start = span_start(questions.cut, window, config.chunk_size)
    # Exactly the chunks that a question still sees as events.
    chunk = np.maximum(questions.cut - 1, 0) // config.chunk_size
    assert np.array_equal(start, np.maximum(chunk - config.window_chunks, 0) * config.chunk_size)
    short = torch.from_numpy(start == 0)
    assert short.any()
    assert not short.all()
    torch.testing.assert_close(cut[short], whole[short], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(cut[~short], whole[~short], rtol=1e-2)


def test_truncated_counts_owned_items_in_its_window_only(dataset, recommender, questions, ownership):
    network = recommender.network
    length = window_events(network.config)
    (scorer,) = run_scorers("truncated", network, dataset, questions, ownership, ["none"], max_length=length)
    scores, plain = scorer.scores(questions), scorer.vectors @ scorer.items.T
    start = span_start(questions.cut, length, network.config.chunk_size)
    whole, window = ownership.before(questions), ownership.before(questions, start)
    held = torch.zeros(scores.shape, dtype=torch.bool)
    held[window.question, window.item] = True
    forgotten = torch.zeros(scores.shape, dtype=torch.bool)
    forgotten[whole.question, whole.item] = True
    forgotten &= ~held
    assert forgotten.any()
    assert torch.equal(scores[forgotten], plain[forgotten])
    assert torch.all(scores[held] > plain[held])


@pytest.mark.parametrize("protocol", ["loo", "global"])
def test_the_newest_events_alone_give_what_they_give_at_their_true_positions(
    protocol, dataset, recommender, ownership, rng
):
    """Any reach, questions that share a span together: against a plain forward pass for each alone; a reach beyond
    every history changes nothing."""
    network = recommender.network
    questions = ask(dataset.histories, protocol)
    k = network.config.chunk_size
    length = int(rng.integers(k, 60))
    (scorer,) = run_scorers("ksa", network, dataset, questions, ownership, ["none"], max_length=length)
    batch = questions_batch(
        dataset.histories, questions.user, np.arange(len(questions)), questions.cut, chunk_size=k, max_length=length
    )
    assert int(batch.offsets.diff().max()) <= length
    assert torch.all(batch.first_position % k == 0)
    with torch.no_grad():
        torch.testing.assert_close(scorer.vectors, network(batch), rtol=1e-4, atol=1e-4)
    (whole,) = run_scorers("ksa", network, dataset, questions, ownership, ["none"])
    (beyond,) = run_scorers("ksa", network, dataset, questions, ownership, ["none"], max_length=10**6)
    torch.testing.assert_close(whole.scores(questions), beyond.scores(questions), rtol=1e-4, atol=1e-4)
