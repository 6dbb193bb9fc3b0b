import dataclasses

import numpy as np
import pytest
import torch

from recsys_ksa.data.assemble import questions_batch
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.evaluate.ksa_scorer import run_scorers, user_vectors
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import ask
from recsys_ksa.evaluate.stored_summaries import next_longer, stored_summaries
from recsys_ksa.features import NO_GAP
from recsys_ksa.model.network import Network
from recsys_ksa.model.place import place_histories
from recsys_ksa.recommender import Recommender


@pytest.fixture(scope="module")
def dataset(tiny_data):
    return open_dataset(tiny_data)


@pytest.fixture(scope="module")
def network(tiny_run):
    """Two layers, one summary a chunk of 4, a window of one chunk: most histories are older than the stacked window."""
    trained = Recommender.load(tiny_run).network
    torch.manual_seed(3)
    config = trained.config.model_copy(update={"chunk_size": 4, "window_chunks": 1, "summaries_per_chunk": 2})
    return Network(config, trained.features).eval()


def vectors(network, dataset, questions, memory):
    (scorer,) = run_scorers("ksa", network, dataset, questions, Ownership(dataset.histories), ["none"], memory=memory)
    return scorer.vectors


@pytest.mark.parametrize("memory", ["zeroed", "shuffled"])
def test_replaced_summaries_matter_where_there_are_old_ones_only(memory, network, dataset):
    questions = ask(dataset.histories, "loo")
    own, other = (vectors(network, dataset, questions, kind) for kind in ("own", memory))
    short = torch.from_numpy(questions.cut <= 2 * network.config.chunk_size)
    assert short.any()
    torch.testing.assert_close(own[short], other[short], rtol=1e-5, atol=1e-5)
    assert torch.all((own - other)[~short].norm(dim=1) > 1e-3 * own[~short].norm(dim=1))


def test_zeroed_knows_nothing_beyond_the_stacked_window(network, dataset, rng):
    """Other items in all chunks before it: nothing moves; with its own summaries the answer does."""
    histories = dataset.histories
    questions = ask(histories, "loo")
    k, reach = network.config.chunk_size, network.config.window_chunks * len(network.config.layers)
    position = np.arange(histories.num_events) - np.repeat(histories.offsets[:-1], histories.lengths)
    cut = np.zeros(histories.num_users, dtype=np.int64)
    cut[questions.user] = questions.cut
    old = position // k < np.repeat((cut - 1) // k - reach, histories.lengths)
    changed = np.array(histories.item_index)
    changed[old] = rng.integers(1, dataset.num_items, int(old.sum()))
    altered = dataclasses.replace(dataset, histories=dataclasses.replace(histories, item_index=changed))
    found = {memory: [vectors(network, data, questions, memory) for data in (dataset, altered)]
             for memory in ("own", "zeroed")}  # fmt: skip
    torch.testing.assert_close(*found["zeroed"], rtol=1e-5, atol=1e-5)
    moved = torch.from_numpy(old[histories.offsets[questions.user]])
    assert moved.any()
    assert not torch.allclose(found["own"][0][moved], found["own"][1][moved], rtol=1e-3)


def test_shuffled_reads_what_the_next_longer_history_left(network, dataset):
    """Each layer's summaries of a user against those of a pass over the other user alone, chunk by chunk."""
    histories, k = dataset.histories, network.config.chunk_size
    users = np.array([3, 7, int(np.argmax(histories.lengths))])
    cuts = histories.lengths[users] - 1
    batch = questions_batch(histories, users, np.arange(3), cuts, chunk_size=k)
    found = stored_summaries(network, histories, users, batch, "shuffled", "auto")
    other, per_chunk, start = next_longer(histories.lengths)[users], network.config.summaries_per_chunk, 0
    for user, stranger, cut in zip(users, other, cuts):
        assert user != stranger
        alone = questions_batch(histories, np.array([stranger]), np.zeros(1, int), histories.lengths[[stranger]],
                                chunk_size=k)  # fmt: skip
        place = place_histories(network.config, alone.offsets, alone.first_position, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            events = network.embed(alone.item_index, alone.event_type, alone.gap_bucket, alone.offsets.diff())
            rows = network.encode(events, place).rows
        wanted = cut // k * per_chunk
        for layer, expected in zip(found, rows):
            mine = layer.summaries[start : start + wanted]
            theirs = expected.summaries[:wanted]
            torch.testing.assert_close(mine[: len(theirs)], theirs, rtol=1e-4, atol=1e-4)
            assert not mine[len(theirs) :].any()
        start += wanted
    assert start == len(found[0].summaries)


def test_the_next_longer_history_is_anothers():
    assert next_longer(np.array([5, 9, 5, 7])).tolist() == [2, 3, 3, 1]


def test_a_network_without_old_chunks_is_left_as_it_is(network, dataset):
    batch = questions_batch(dataset.histories, np.array([0, 1]), np.array([0, 1]), np.array([3, 0]),
                            chunk_size=network.config.chunk_size)  # fmt: skip
    buckets = np.full((1, 2), NO_GAP)
    for memory in ("zeroed", "shuffled"):
        fixed = stored_summaries(network, dataset.histories, np.array([0, 1]), batch, memory, "auto")
        torch.testing.assert_close(
            user_vectors(network, batch, buckets, "auto", fixed), user_vectors(network, batch, buckets)
        )
