"""Every feature at once, the whole way: prepared, trained, appended event by event, and asked as evaluation asks."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys_ksa import Recommender
from recsys_ksa.cli import call_verb
from recsys_ksa.data.assemble import questions_batch
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.errors import DataError
from recsys_ksa.evaluate.ksa_scorer import user_vectors
from recsys_ksa.features import EventFeatures
from recsys_ksa.testing import item_table, lifelong_log, prepared_dataset, trained_run

PREPARE = """
[columns]
value = "rating"
[items]
side_features = ["category"]
multi_features = ["genres"]
vectors.text = ["embedding"]
"""
FEATURES = [
    'model.side_features=["category", "genres", "text"]',
    'model.calendar=["hour", "weekday"]',
    "model.session_gap=3600",
    "model.value_edges=[1.5, 3.0]",
    'model.item_vectors="content"',
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    random = np.random.default_rng(3)
    log, items = lifelong_log(5, 40, 60, median_length=50, max_length=150, event_types=True), item_table(60)
    ratings = [None if share < 0.2 else round(share * 5, 1) for share in random.random(log.num_rows)]
    genres = [random.choice(["a", "b", "c"], random.integers(0, 4), replace=False).tolist() for _ in range(60)]
    embeddings = [None if n % 7 == 0 else random.normal(size=6).tolist() for n in range(60)]
    items = items.append_column("genres", pa.array(genres, pa.list_(pa.string())))
    items = items.append_column("embedding", pa.array(embeddings, pa.list_(pa.float32())))
    log = log.append_column("rating", pa.array(ratings, pa.float64()))
    return prepared_dataset(tmp_path_factory.mktemp("features"), log, items=items, config=PREPARE)


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("features") / "run", dataset.path, FEATURES, steps=3)


def test_appending_raw_events_equals_the_batch_that_evaluation_reads(
    dataset: Dataset, run: Path, rng: np.random.Generator
) -> None:
    exact = Recommender.load(run, precision="float64")
    network, histories = exact.network, dataset.histories
    assert histories.event_type is not None
    assert histories.value is not None
    users = rng.choice(histories.num_users, 4, replace=False)
    lengths = histories.lengths[users]
    batch = questions_batch(
        histories,
        users,
        np.arange(4),
        lengths,
        chunk_size=network.config.chunk_size,
        features=EventFeatures.of(network.config),
    )
    (expected,) = user_vectors(network, batch, np.zeros((1, 4), dtype=np.int64))
    names = dataset.vocab["event_type"]
    for user, wanted in zip(users.tolist(), expected):
        rows = histories.rows(user)
        items = [dataset.items.item_id[index] for index in histories.item_index[rows]]
        times, types = histories.timestamp[rows].tolist(), [names[index] for index in histories.event_type[rows]]
        values = [None if np.isnan(value) else float(value) for value in histories.value[rows]]
        state, at = exact.new_state(), 0
        while at < len(items):
            step = int(rng.integers(1, 12))
            part = slice(at, at + step)
            worth = {"value": values[part]}
            state = exact.append(state, items[part], times[part], types[part], features=worth)  # type: ignore[arg-type]
            at += step
        found = exact.user_vector(state).to(wanted)
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-6  # evaluation keeps float32


def test_values_change_answers_and_the_hash_of_the_history(dataset: Dataset, run: Path) -> None:
    rec = Recommender.load(run)
    item = str(dataset.items.item_id[3])
    states = [
        rec.append(rec.new_state(), [item], [1_700_000_000], features=features)
        for features in (None, {"value": [None]}, {"value": [1.0]}, {"value": [2.0]})
    ]
    assert states[0].history_hash == states[1].history_hash
    assert len({state.history_hash for state in states}) == 3
    vectors = [rec.user_vector(state) for state in states]
    assert bool((vectors[0] == vectors[1]).all())
    assert not bool((vectors[2] == vectors[3]).all())


def test_features_the_run_does_not_read_and_values_that_are_none_are_refused(run: Path, tiny_run: Path) -> None:
    rec = Recommender.load(run)
    with pytest.raises(DataError, match=r"features: expected value, got \['mood'\]"):
        rec.append(rec.new_state(), ["i1"], [5], features={"mood": [1]})
    with pytest.raises(DataError, match="expected values as numbers or None, got 'high'"):
        rec.append(rec.new_state(), ["i1"], [5], features={"value": ["high"]})
    with pytest.raises(DataError, match="expected 1 values, one an item id, got 2"):
        rec.append(rec.new_state(), ["i1"], [5], features={"value": [1, 2]})
    plain = Recommender.load(tiny_run)
    with pytest.raises(DataError, match="expected none, as the run reads none"):
        plain.append(plain.new_state(), ["i1"], [5], features={"value": [1]})


def test_evaluation_and_the_index_take_such_a_run(dataset: Dataset, run: Path, tmp_path: Path) -> None:
    open_dataset(dataset.path)
    call_verb("index", [str(run)])
    file = tmp_path / "rows.json"
    call_verb("evaluate", [str(run), "--data", str(dataset.path), "--tracking", "none", "--json", str(file)])
    assert '"ksa"' in file.read_text()
