"""A feature that no longer means what it meant in training is refused by its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from recsys_ksa.config import ModelConfig
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.errors import RunError
from recsys_ksa.evaluate.evaluation import check_run
from recsys_ksa.features.definitions import feature_hashes
from recsys_ksa.run import open_run
from recsys_ksa.testing import trained_run

VOCABULARIES = {"event_type": [None, "view", "buy"], "brand": [None, "a", "b"]}
ON: dict[str, Any] = {
    "calendar": ["hour", "weekday"],
    "session_gap": 600,
    "value_edges": [1.0, 2.0],
    "side_features": ["brand", "text"],
}


def hashes(vocabularies: dict[str, Any] = VOCABULARIES, **changes: Any) -> dict[str, str]:
    return feature_hashes(ModelConfig.model_validate(ON | changes), vocabularies)


def test_each_feature_has_a_hash_of_its_own() -> None:
    found = hashes()
    assert set(found) == {"gap", "hour", "weekday", "session", "value", "event_type", "brand", "text"}
    assert len(set(found.values())) == len(found)
    assert set(feature_hashes(ModelConfig(), {})) == {"gap"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("session", {"session_gap": 601}),
        ("value", {"value_edges": [1.0, 2.5]}),
        ("brand", {"vocabularies": VOCABULARIES | {"brand": [None, "b", "a"]}}),
        ("event_type", {"vocabularies": VOCABULARIES | {"event_type": [None, "view", "buy", "cart"]}}),
        ("text", {"vocabularies": VOCABULARIES | {"text": [None]}}),
    ],
)
def test_a_change_of_meaning_changes_that_hash_alone(name: str, changes: dict[str, Any]) -> None:
    before, after = hashes(), hashes(**changes)
    assert {each for each in before if before[each] != after[each]} == {name}


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = ['model.side_features=["category"]', "model.session_gap=1800"]
    return trained_run(tmp_path_factory.mktemp("features") / "run", tiny_data, changes)


def test_a_run_whose_vocabulary_was_renumbered_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    table = pq.read_table(copy / "vocab" / "category.parquet")
    pq.write_table(table.take([0, 2, 1, *range(3, table.num_rows)]), copy / "vocab" / "category.parquet")
    with pytest.raises(RunError, match=r"feature 'category': expected the definition and vocabulary the run was"):
        open_run(copy)


def test_a_run_of_another_definition_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_ksa.features.definitions.LONGEST", 32)
    with pytest.raises(RunError, match=r"feature 'session': .* its own files and this version have another"):
        open_run(run)


def test_a_data_set_of_another_vocabulary_is_refused_although_its_histories_are_the_same(
    run: Path, tiny_data: Path
) -> None:
    dataset = open_dataset(tiny_data)
    check_run(open_run(run), dataset)
    dataset.vocab["category"].append("another")
    with pytest.raises(RunError, match=r"feature 'category': .* and this version have another"):
        check_run(open_run(run), dataset)


def test_a_run_older_than_the_hashes_opens(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    info = json.loads((copy / "run.json").read_text())
    del info["feature_hashes"]
    (copy / "run.json").write_text(json.dumps(info))
    assert open_run(copy).info.feature_hashes is None
