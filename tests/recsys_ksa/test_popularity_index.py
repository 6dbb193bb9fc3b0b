"""A release's popularity: one column, written by `ksa index` alone, the same that evaluation scores with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recsys_ksa import Recommender
from recsys_ksa.cli import call_verb, main
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.errors import DataError, RunError
from recsys_ksa.evaluate.ksa_scorer import run_scorers
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import ask
from recsys_ksa.run import load_network, open_run
from recsys_ksa.testing import trained_run
from recsys_ksa.train.validation import Validation


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = [
        "model.item_bias=popularity-7d",
        "model.own_item_bias=true",
        "loss.targets=next-set",
        "data.split=global",
    ]
    return trained_run(tmp_path_factory.mktemp("popular") / "run", tiny_data, changes, steps=3)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def state_of(rec: Recommender, dataset: Dataset, user: int, cut: int):
    rows = slice(int(dataset.histories.offsets[user]), int(dataset.histories.offsets[user]) + cut)
    items = [str(dataset.items.item_id[item]) for item in dataset.histories.item_index[rows]]
    kinds = dataset.vocab.get("event_type")
    types = None if kinds is None else [kinds[kind] for kind in dataset.histories.event_type[rows]]
    return rec.append(rec.new_state(), items, dataset.histories.timestamp[rows].tolist(), types)


def test_what_is_evaluated_is_what_is_served(run: Path, tiny_data: Path, rng: np.random.Generator) -> None:
    dataset = open_dataset(tiny_data)
    network, ownership = load_network(open_run(run)), Ownership(dataset.histories)
    questions = ask(dataset.histories, "global")
    (scorer,) = run_scorers("ksa", network, dataset, questions, ownership, ["target"])
    at = int(rng.integers(len(questions)))
    one = questions.slice(at, at + 1)
    scores = scorer.scores(one)[0]
    time = int(one.timestamp[0])
    call_verb("index", [str(run), "--popularity-as-of", str(time)])
    rec = Recommender.load(run)
    state = state_of(rec, dataset, int(one.user[0]), int(one.cut[0]))
    answer = rec.recommend(state, 20, request_time=time, exclude_seen=False)
    best = torch.topk(scores[1:], 20).values
    np.testing.assert_allclose([score for _, score in answer], best.numpy(), rtol=1e-4, atol=1e-4)
    ids = [item for item, _ in answer]
    np.testing.assert_allclose(rec.score(state, ids, time), [score for _, score in answer], rtol=1e-5, atol=1e-5)


def test_the_column_has_a_time_and_a_hash_of_its_own_and_states_do_not_depend_on_it(run: Path, tiny_data: Path) -> None:
    last = int(open_dataset(tiny_data).histories.timestamp.max())
    versions, fingerprints, columns = set(), set(), set()
    for time in (last, last - 30 * 86_400):
        call_verb("index", [str(run), "--popularity-as-of", str(time)])
        manifest = json.loads((run / "index" / "manifest.json").read_text())
        assert manifest["popularity_as_of"] == time
        columns.add(manifest["popularity_hash"])
        rec = Recommender.load(run)
        assert rec.popularity is not None
        assert rec.popularity.as_of == time
        versions.add(rec.index.version)
        fingerprints.add(rec.fingerprint)
    assert (len(versions), len(columns), len(fingerprints)) == (2, 2, 1)


def test_without_an_index_items_are_as_popular_as_at_the_last_event(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    memory = Recommender.load(run)
    last = int(open_dataset(tiny_data).histories.timestamp.max())
    assert memory.popularity is not None
    assert memory.popularity.as_of == last
    call_verb("index", [str(run), "--export", str(tmp_path / "bundle")])
    shutil.rmtree(tmp_path / "bundle" / "index")
    versions = {Recommender.load(path).index.version for path in (run, tmp_path / "bundle")}
    assert versions == {memory.index.version}


def test_newer_counts_come_from_another_data_set_by_item_id(run: Path, tiny_data: Path) -> None:
    call_verb("index", [str(run)])
    own = Recommender.load(run).index.version
    call_verb("index", [str(run), "--data", str(tiny_data)])
    assert Recommender.load(run).index.version == own


def test_a_column_that_was_altered_is_refused(run: Path) -> None:
    call_verb("index", [str(run)])
    file = run / "index" / "popularity.safetensors"
    column = load_file(file)
    column["gain"][3] += 0.1
    save_file(column, file, {"as_of": "1600000000"})
    with pytest.raises(RunError, match="popularity column is not the one"):
        Recommender.load(run)
    file.unlink()
    with pytest.raises(RunError, match="ksa index"):
        Recommender.load(run)
    shutil.rmtree(run / "index")
    (run / "popularity.parquet").unlink()
    with pytest.raises(DataError, match="expected counts of items by day"):
        Recommender.load(run)


def test_flags_that_mean_nothing_here_are_one_line(run: Path, tiny_run: Path, capsys) -> None:
    assert main(["index", str(tiny_run), "--popularity-as-of", "1600000000"]) == 2
    assert 'expected a run with model.item_bias = "popularity-7d"' in capsys.readouterr().err
    assert main(["index", str(run), "--popularity-as-of", "99"]) == 2
    assert "popularity as of 99: expected events on the 7 whole days before it" in capsys.readouterr().err
    assert not (run / "index").exists()


def test_validation_in_training_ranks_as_evaluation_does(run: Path, tiny_data: Path) -> None:
    """On each user's first validation timestamp, histories whole: both count what came before, nothing held out."""
    dataset, opened = open_dataset(tiny_data), open_run(run)
    network = load_network(opened)
    questions = ask(dataset.histories, "global", "valid")
    first = np.unique(questions.user, return_index=True)[1]
    (scorer,) = run_scorers("ksa", network, dataset, questions, Ownership(dataset.histories), ["target"])
    figures = []
    for at in first:
        one = questions.slice(int(at), int(at) + 1)
        scores = scorer.scores(one)
        scores[:, 0] = -torch.inf
        targets = set(one.target_item[one.target_item > 0].tolist())
        if not targets:
            continue
        order = sorted(range(scores.shape[1]), key=lambda item: (-float(scores[0, item]), item in targets))
        gains = [1 / np.log2(place + 2) for place, item in enumerate(order[:10]) if item in targets]
        figures.append(sum(gains) / sum(1 / np.log2(place + 2) for place in range(min(len(targets), 10))))
    changes = {"data": opened.config.data.model_copy(update={"max_length": 10**6})}
    changes["loss"] = opened.config.loss.model_copy(update={"request_time": "target"})
    changes["train"] = opened.config.train.model_copy(update={"validation_users": 10**6})
    config = opened.config.model_copy(update=changes)
    found = Validation(dataset, config).ndcg(network, torch.device("cpu"), "auto", False)
    assert found == pytest.approx(float(np.mean(figures)), abs=1e-3)
