"""Features of users and request times: what a request tells gives the rows that the data set gives; no state knows."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ksa import Recommender
from recsys_ksa.cli import call_verb
from recsys_ksa.commands.config_files import config_file
from recsys_ksa.config import ModelConfig, RunConfig, load_config, parse_config
from recsys_ksa.data.assemble import questions_batch
from recsys_ksa.data.dataset import Dataset
from recsys_ksa.errors import ConfigError, DataError
from recsys_ksa.evaluate.ksa_scorer import user_vectors
from recsys_ksa.features import EventFeatures, QuestionFeatures, WeightedRows, told_users
from recsys_ksa.model.fingerprint import release_hash, state_fingerprint
from recsys_ksa.model.network import Network
from recsys_ksa.testing import lifelong_log, prepared_dataset, trained_run
from recsys_ksa.train.run_files import feature_schema

PREPARE = """
[users]
features = ["country", "shop"]
multi_features = ["tags", "codes"]
numbers = ["age", "spent"]
"""
EDGES: dict[str, tuple[float, ...]] = {"age": (18.0, 25.5, 60.0), "spent": (0.0, 0.7)}
NAMES = ["country", "shop", "tags", "codes", "age", "spent"]
MODEL = [
    f"model.user_features={NAMES}",
    *(f"model.user_edges.{name}={list(edges)}" for name, edges in EDGES.items()),
    'model.request_calendar=["hour", "weekday"]',
]


def described(random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Random rows of a table of users."""

    def one(user: int) -> dict[str, Any]:
        texts = [["de", " fr", "", None, "é|x"], ["a", "b ", " c", "", "dé"]]
        tags, codes = (random.integers(0, 5, random.integers(0, 5)) for _ in range(2))
        return {
            "user_id": f"u{user}",
            "country": texts[0][random.integers(5)],
            "shop": [None, 0, 7, -3][random.integers(4)],
            "tags": None if random.random() < 0.1 else [texts[1][n] for n in tags],
            "codes": None if random.random() < 0.1 else codes.tolist(),
            "age": None if random.random() < 0.2 else int(random.integers(0, 90)),
            "spent": [None, float("nan"), -0.1, 0.0, 0.7, float("inf")][random.integers(6)],
        }

    return [one(user) for user in range(count)]


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    seed = int(os.environ.get("KSA_TEST_SEED", np.random.SeedSequence().generate_state(1)[0]))
    print(f"of the table of users: KSA_TEST_SEED={seed}")
    return described(np.random.default_rng(seed), 60)


@pytest.fixture(scope="module")
def dataset(table: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users 0 to 59 are described, 40 to 79 have events too: some are missing from either."""
    folder = tmp_path_factory.mktemp("users")
    pq.write_table(pa.Table.from_pylist(table), folder / "users.parquet")
    log = lifelong_log(5, 80, 60, median_length=40, max_length=120)
    log = log.filter(pa.array([int(user[1:]) >= 10 for user in log["user_id"].to_pylist()]))
    return prepared_dataset(folder, log, arguments=["--users", str(folder / "users.parquet")], config=PREPARE)


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("users") / "run", dataset.path, MODEL, steps=3)


def told_of(table: list[dict[str, Any]], user_id: str) -> dict[str, Any] | None:
    """What a request tells of a user: the row of the table, a number that is none as None."""
    rows = [row for row in table if row["user_id"] == user_id]
    spent = [None if row["spent"] != row["spent"] else row["spent"] for row in rows]
    return {name: rows[0][name] for name in NAMES} | {"spent": spent[0]} if rows else None


def index_of(dataset: Dataset) -> dict[str, dict[str, int]]:
    vocabularies = {name: dataset.vocab[f"user_{name}"] for name in NAMES[:4]}
    return {name: {v: row for row, v in enumerate(values) if v is not None} for name, values in vocabularies.items()}


def plain(told: dict[str, Any] | None, time: int | None, dataset: Dataset) -> dict[int, float]:
    """Row -> weight of one question, as one would say it."""
    told, known = told or {}, index_of(dataset)
    sizes = [25, 8, *(len(dataset.vocab[f"user_{name}"]) for name in NAMES[:4]), 5, 4]
    hour = 0 if time is None else 1 + time // 3600 % 24
    weekday = 0 if time is None else 1 + (time // 86400 + 3) % 7
    rows: list[list[int]] = [[hour], [weekday]]
    for name in ("country", "shop"):
        rows.append([known[name].get(str(told.get(name)), 0)])
    for name in ("tags", "codes"):
        rows.append(sorted({known[name][text] for each in told.get(name) or [] if (text := str(each).strip())}))
    for name, edges in EDGES.items():
        value = told.get(name)
        rows.append([0 if value is None else 1 + sum(edge <= value for edge in edges)])
    firsts = np.cumsum([0, *sizes])
    return {int(first) + row: 1 / len(own) for first, own in zip(firsts, rows) for row in own}


def as_said(rows: WeightedRows | None) -> list[dict[int, float]]:
    assert rows is not None
    spans = zip(rows.offsets, rows.offsets[1:])
    return [dict(zip(rows.row[a:b].tolist(), rows.weight[a:b].astype(float).tolist())) for a, b in spans]


def test_online_rows_equal_batch_rows_and_a_plain_reading(
    dataset: Dataset, table: list[dict[str, Any]], rng: np.random.Generator
) -> None:
    histories, ids = dataset.histories, dataset.histories.user_ids()
    assert histories.users is not None
    features = QuestionFeatures(("hour", "weekday"), histories.users.features, EDGES)
    user = rng.integers(0, len(ids), 200)
    time, shown = rng.integers(0, 2**33, 200), rng.random(200) < 0.8
    batch = as_said(features.rows(histories.users, user, time, shown))
    for question, row in enumerate(user.tolist()):
        told = told_of(table, ids[row])
        columns = told_users([told], histories.users.features, index_of(dataset))
        here = slice(question, question + 1)
        (online,) = as_said(features.rows(columns, np.zeros(1, np.int64), time[here], shown[here]))
        said = plain(told, int(time[question]) if shown[question] else None, dataset)
        assert online == batch[question]
        assert online == pytest.approx(said)
    assert {user for user in ids if told_of(table, user) is None}
    assert dataset.manifest.users_described == sum(told_of(table, user) is not None for user in ids) < len(table)


def test_a_question_that_is_told_nothing_has_the_rows_of_a_user_who_is_not_described(
    dataset: Dataset, rng: np.random.Generator
) -> None:
    users = dataset.histories.users
    assert users is not None
    features = QuestionFeatures((), users.features, EDGES)
    user, nothing = rng.integers(0, dataset.histories.num_users, 50), np.zeros(50, dtype=bool)
    found = as_said(features.rows(users, user, np.zeros(50, np.int64), nothing, told=nothing))
    columns = told_users([None], users.features, index_of(dataset))
    (nobody,) = as_said(features.rows(columns, np.zeros(1, np.int64), np.zeros(1, np.int64), nothing[:1]))
    assert found == [nobody] * 50


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_answers_equal_those_that_evaluation_reads(
    precision: Any, dataset: Dataset, table: list[dict[str, Any]], run: Path, rng: np.random.Generator
) -> None:
    rec, histories = Recommender.load(run, precision=precision), dataset.histories
    ids = histories.user_ids()
    users = np.sort(rng.choice(histories.num_users, 6, replace=False))
    cuts = rng.integers(0, histories.lengths[users] + 1)
    cuts[0] = 0
    times = rng.integers(1_600_000_000, 1_700_000_000, 6)
    telling = QuestionFeatures.of(rec.network.config, rec.network.features.users)
    batch = questions_batch(
        histories,
        users,
        np.arange(6),
        cuts,
        times,
        chunk_size=rec.network.config.chunk_size,
        features=EventFeatures.of(rec.network.config),
        telling=telling,
    )
    (expected,) = user_vectors(rec.network, batch, batch.request_bucket[None].numpy())
    torch_wide = rec.network(batch) if precision == "float64" else expected
    states = []
    for user, cut in zip(users.tolist(), cuts.tolist()):
        rows = slice(histories.rows(user).start, histories.rows(user).start + cut)
        items = [str(dataset.items.item_id[index]) for index in histories.item_index[rows]]
        states.append(rec.append(rec.new_state(), items, histories.timestamp[rows].tolist()))
    told = [told_of(table, ids[user]) for user in users.tolist()]
    found = rec.user_vectors(states, times.tolist(), told)
    alone = [rec.user_vector(state, time, user) for state, time, user in zip(states, times.tolist(), told)]
    for wanted, wide, one, own in zip(expected, torch_wide, found, alone):
        for answer in (wide, one, own):
            assert float((answer.float() - wanted).norm() / wanted.norm()) <= 1e-5


def test_what_is_told_changes_answers_and_no_state(run: Path) -> None:
    rec = Recommender.load(run)
    empty, state = rec.new_state(), rec.append(rec.new_state(), ["i1", "i2"], [1_600_000_000, 1_600_000_100])
    for each in (empty, state):
        plain, told = rec.user_vector(each, 1_600_000_200), rec.user_vector(each, 1_600_000_200, {"age": 30})
        assert not bool((plain == told).all())
        assert bool((plain == rec.user_vector(each, 1_600_000_200, {"country": "nowhere", "tags": ["new"]})).all())
    assert not bool((rec.user_vector(state, 1_600_000_200) == rec.user_vector(state, 1_600_003_600)).all())
    first = rec.recommend(state, 3, user={"age": 30})
    assert first == rec.recommend(state, 3, user={"age": 31})  # one bucket
    assert [score for _, score in first] == pytest.approx(rec.score(state, [i for i, _ in first], user={"age": 30}))
    before = state_fingerprint(rec.network), release_hash(rec.network)
    assert rec.network.question is not None
    rec.network.question.weight.data += 1
    assert state_fingerprint(rec.network) == before[0]
    assert release_hash(rec.network) != before[1]


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ({"mood": 1}, r"user: expected features of the run \(country, .*\), got \['mood'\]"),
        ({"age": "old"}, "age: expected a number or None, got 'old'"),
        ({"age": True}, "age: expected a number"),
        ({"age": 10**400}, "age: expected a number within float64"),
        ({"country": 1.5}, "country: expected a text, an integer or None, got 1.5"),
        ({"tags": "a"}, "tags: expected a list of texts or integers, got 'a'"),
        ({"tags": [["a"]]}, "tags: expected a text, an integer or None"),
    ],
)
def test_what_is_no_feature_of_the_run_is_refused(user: dict[str, Any], said: str, run: Path) -> None:
    rec = Recommender.load(run)
    with pytest.raises(DataError, match=said):
        rec.recommend(rec.new_state(), user=user)


def test_a_run_without_such_features_takes_none(tiny_run: Path) -> None:
    rec = Recommender.load(tiny_run)
    with pytest.raises(DataError, match=r"expected features of the run \(none, as the run reads none\)"):
        rec.recommend(rec.new_state(), user={"age": 3})
    assert rec.recommend(rec.new_state(), user={}) == rec.recommend(rec.new_state())


def test_evaluation_and_the_index_take_such_a_run(dataset: Dataset, run: Path, tmp_path: Path) -> None:
    call_verb("index", [str(run)])
    file = tmp_path / "rows.json"
    call_verb("evaluate", [str(run), "--data", str(dataset.path), "--tracking", "none", "--json", str(file)])
    assert '"ksa"' in file.read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"user_features": ["a", "a"]}, "user_features must name each feature once"),
        ({"user_edges": {"a": [1.0]}}, "user_edges: expected names of user_features, got 'a'"),
        ({"user_features": ["a"], "user_edges": {"a": [2.0, 1.0]}}, "user_edges.a must ascend"),
        ({"user_features": ["a"], "user_edges": {"a": []}}, "user_edges.a must ascend and have at least one"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(ModelConfig, changes, "run.toml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.user_features=['mood']"], r"expected features of the data set's users \(.*\), got 'mood'"),
        (["model.user_features=['age']"], "expected edges of the user features that are numbers.*'age' is a number"),
        (["model.user_features=['tags']", "model.user_edges.tags=[1.0]"], "'tags' is a list"),
    ],
)
def test_features_that_the_data_set_does_not_have_are_refused(
    changes: list[str], said: str, dataset: Dataset, tmp_path: Path
) -> None:
    config = load_config(RunConfig, config_file("smoke.toml"), changes)
    schema = feature_schema(dataset, config)
    with pytest.raises(ConfigError, match=said):
        Network(config.model, schema)
