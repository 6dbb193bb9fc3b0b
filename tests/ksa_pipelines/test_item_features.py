"""Items of several categories, and vectors: read, numbered, extended, blanked, as a plain reading has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys_ksa.cli import call_verb
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.errors import ConfigError, SchemaError

CONFIG = """
[items]
side_features = ["brand"]
multi_features = ["genres", "tags"]
[items.vectors]
text = ["embedding"]
place = ["x", "y"]
"""


def items(ids: str, **changes: Any) -> pl.DataFrame:
    n = len(ids)
    columns = {
        "item_id": list(ids),
        "brand": ["b"] * n,
        "genres": [["Drama", "Comedy | Drama|", "", None][at % 4] for at in range(n)],
        "tags": [[[3, 1], [], None, [1]][at % 4] for at in range(n)],
        "embedding": [None if at % 4 == 3 else [float(at), 0.5, -1.0] for at in range(n)],
        "x": [float(at) for at in range(n)],
        "y": [None if at == 1 else at for at in range(n)],
    }
    columns["genres"][0] = "Drama|Action"
    return pl.DataFrame(columns | changes)


def log(ids: str, start: int = 1_600_000_000) -> pl.DataFrame:
    return pl.DataFrame(
        {"user_id": ["u", "v"] * len(ids), "item_id": [item for item in ids for _ in "uv"]}
    ).with_row_index("timestamp", offset=start)


def prepared(folder: Path, described: pl.DataFrame, config: str = CONFIG) -> Dataset:
    log("abcd").write_parquet(folder / "log.parquet")
    described.write_parquet(folder / "items.parquet")
    (folder / "prepare.toml").write_text(config)
    paths = [str(folder / name) for name in ("log.parquet", "items.parquet", "prepare.toml")]
    call_verb("prepare", [paths[0], "--items", paths[1], "--config", paths[2], "--out", str(folder / "ds")])
    return open_dataset(folder / "ds")


def categories(dataset: Dataset, name: str) -> dict[str | None, list[str | None]]:
    found, values = dataset.items.multi[name], dataset.vocab[name]
    return {
        item: [values[index] for index in found.index[found.offsets[row] : found.offsets[row + 1]]]
        for row, item in enumerate(dataset.items.item_id)
    }


def test_lists_texts_and_columns_of_numbers_are_read(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, items("abcd"))
    assert categories(dataset, "genres") == {
        None: [],
        "a": ["Action", "Drama"],
        "b": ["Comedy", "Drama"],
        "c": [],
        "d": [],
    }
    assert categories(dataset, "tags") == {None: [], "a": ["1", "3"], "b": [], "c": [], "d": ["1"]}
    assert dataset.items.vectors["text"].tolist() == [
        [0, 0, 0],
        [0, 0.5, -1],
        [1, 0.5, -1],
        [2, 0.5, -1],
        [0, 0, 0],
    ]
    assert dataset.items.vectors["place"].tolist() == [[0, 0], [0, 0], [0, 0], [2, 2], [3, 3]]
    counts = pl.read_parquet(tmp_path / "ds" / "vocab" / "genres.parquet")
    assert dict(counts.select("value", "count").iter_rows())["Drama"] == 2


def test_a_later_log_s_items_come_after_and_what_nobody_has_is_blanked(tmp_path: Path) -> None:
    before = prepared(tmp_path, items("abcd"))
    log("ef", 1_600_000_100).with_columns(pl.lit("w").alias("user_id")).write_parquet(tmp_path / "more.parquet")
    more = items("ef", genres=["Western|Action", "Drama"])
    more.write_parquet(tmp_path / "more_items.parquet")
    ds = str(tmp_path / "ds")
    call_verb("append-log", [ds, str(tmp_path / "more.parquet"), "--items", str(tmp_path / "more_items.parquet")])
    after = open_dataset(ds)
    assert after.vocab["genres"] == [*before.vocab["genres"], "Western"]
    old, new = categories(before, "genres"), categories(after, "genres")
    assert {item: new[item] for item in old} == old
    assert (new["e"], new["f"]) == (["Action", "Western"], ["Drama"])
    assert after.items.vectors["text"][5].tolist() == [0, 0.5, -1]
    call_verb("forget", [ds, "w"])
    left = open_dataset(ds)
    assert left.vocab["genres"] == [*before.vocab["genres"], None]
    assert left.items.multi["genres"].offsets[-1] == before.items.multi["genres"].offsets[-1]
    assert not left.items.vectors["text"][5:].any()


def test_a_log_appended_without_an_items_file_has_items_without_features(tmp_path: Path) -> None:
    prepared(tmp_path, items("abcd"))
    log("e", 1_600_000_100).write_parquet(tmp_path / "more.parquet")
    call_verb("append-log", [str(tmp_path / "ds"), str(tmp_path / "more.parquet")])
    after = open_dataset(tmp_path / "ds")
    assert categories(after, "genres")["e"] == []
    assert not after.items.vectors["text"][5].any()


def test_a_view_keeps_what_items_have(tmp_path: Path) -> None:
    whole = prepared(tmp_path, items("abcd"))
    call_verb("view", [str(tmp_path / "ds"), "--out", str(tmp_path / "view"), "--max-user-events", "100"])
    view = open_dataset(tmp_path / "view")
    for name in ("genres", "tags"):
        assert categories(view, name) == categories(whole, name)
    for name in ("text", "place"):
        assert np.array_equal(view.items.vectors[name], whole.items.vectors[name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embedding": [[1.0], [1.0, 2.0], None, None]}, "expected vectors of 1 finite numbers, got one of 2"),
        ({"embedding": [[1.0], [float("nan")], None, None]}, "got one with a null, NaN or infinity"),
        ({"embedding": [None] * 4}, "column 'embedding': expected numbers"),
        ({"tags": [[1.5]] * 4}, "expected lists of strings or integers"),
    ],
)
def test_what_is_no_vector_and_no_list_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        prepared(tmp_path, items("abcd", **changes))
    assert not (tmp_path / "ds").exists()


def test_one_name_is_one_feature(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected each name once"):
        prepared(tmp_path, items("abcd"), CONFIG.replace('"genres"', '"brand"'))


def test_data_sets_without_them_are_as_before(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, items("abcd"), "")
    assert (dataset.items.multi, dataset.items.vectors) == ({}, {})
    manifest = json.loads((tmp_path / "ds" / "manifest.json").read_text())
    assert (manifest["multi_features"], manifest["vectors"]) == ([], [])
