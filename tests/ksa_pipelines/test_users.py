"""A table of users: read, numbered, extended, forgotten, as a plain reading has them."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys_ksa.cli import call_verb
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.errors import ConfigError, RecsysKsaError

CONFIG = """
[users]
user_id = "who"
features = ["country"]
multi_features = ["tags"]
numbers = ["age"]
"""
Rows = list[tuple[str | None, Any, Any, Any]]
FIRST: Rows = [
    ("a", "de", "x| y", 1),
    ("b", "", None, None),
    ("a", "again", "z", 2),
    ("nobody", "at", "w", 3),
    (None, "at", "w", 3),
]
SECOND: Rows = [("a", "fr", "x", 9), ("c", "at", "y|v", 4.5), ("b", "it", "", 5)]


def log(users: str, start: int = 1_600_000_000) -> pl.DataFrame:
    names = [user for user in users for _ in "xy"]
    items = [item for _ in users for item in "xy"]
    return pl.DataFrame({"user_id": names, "item_id": items}).with_row_index("timestamp", offset=start)


def table(rows: Rows) -> pl.DataFrame:
    who, country, tags, age = (list(column) for column in zip(*rows))
    types = {"who": pl.String, "country": pl.String, "tags": pl.String, "age": pl.Float64}
    return pl.DataFrame({"who": who, "country": country, "tags": tags, "age": age}, schema=types, strict=False)


def prepared(folder: Path, users: str, rows: Rows | None, config: str = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    log(users).write_parquet(folder / "log.parquet")
    (folder / "prepare.toml").write_text(config)
    arguments = [str(folder / "log.parquet"), "--config", str(folder / "prepare.toml"), "--out", str(folder / "ds")]
    if rows is not None:
        table(rows).write_parquet(folder / "users.parquet")
        arguments += ["--users", str(folder / "users.parquet")]
    call_verb("prepare", arguments)
    return folder / "ds"


def append(dataset: Path, users: str, rows: Rows | None) -> Dataset:
    folder = dataset.parent
    log(users, 1_600_001_000).write_parquet(folder / "new.parquet")
    arguments = [str(dataset), str(folder / "new.parquet")]
    if rows is not None:
        table(rows).write_parquet(folder / "more.parquet")
        arguments += ["--users", str(folder / "more.parquet")]
    call_verb("append-log", arguments)
    return open_dataset(dataset)


def told(dataset: Dataset) -> dict[str, tuple[str | None, list[str | None], float | None]]:
    """What the data set knows of each user, by id."""
    users, vocab = dataset.histories.users, dataset.vocab
    assert users is not None
    columns: Any = users.columns
    tags, found = columns["tags"], {}
    for row, user in enumerate(dataset.histories.user_ids()):
        own = sorted(vocab["user_tags"][index] for index in tags.index[tags.offsets[row] : tags.offsets[row + 1]])
        age = float(columns["age"][row])
        found[user] = (vocab["user_country"][columns["country"][row]], own, None if age != age else age)
    return found


def test_the_first_row_of_a_user_counts_and_who_has_no_event_is_left_out(tmp_path: Path) -> None:
    dataset = open_dataset(prepared(tmp_path, "abc", FIRST))
    assert told(dataset) == {"a": ("de", ["x", "y"], 1.0), "b": (None, [], None), "c": (None, [], None)}
    assert dataset.vocab["user_country"] == [None, "de"]
    assert dataset.vocab["user_tags"] == [None, "x", "y"]
    assert dataset.manifest.users_described == 2
    assert "nobody" not in (tmp_path / "ds" / "manifest.json").read_text()


def test_a_later_table_extends_the_vocabularies_and_describes_those_who_were_not(tmp_path: Path) -> None:
    dataset = append(prepared(tmp_path, "ab", FIRST), "ac", SECOND)
    assert told(dataset) == {"a": ("de", ["x", "y"], 1.0), "b": (None, [], None), "c": ("at", ["v", "y"], 4.5)}
    assert dataset.vocab["user_country"] == [None, "de", "at"]
    assert dataset.vocab["user_tags"] == [None, "x", "y", "v"]
    assert [file.name for file in dataset.manifest.users_files] == ["users.parquet", "more.parquet"]
    earlier = open_dataset(tmp_path / "ds", version=0)
    assert earlier.vocab["user_country"] == [None, "de"]
    counts = pl.read_parquet(tmp_path / "ds" / dataset.manifest.table_file("vocab/user_country.parquet"))["count"]
    assert counts.to_list() == [1, 1, 1]


def test_a_later_log_without_a_table_keeps_what_is_known(tmp_path: Path) -> None:
    dataset = append(prepared(tmp_path, "ab", FIRST), "cd", None)
    assert told(dataset)["a"] == ("de", ["x", "y"], 1.0)
    assert told(dataset)["d"] == (None, [], None)
    call_verb("compact", [str(dataset.path)])
    assert told(open_dataset(dataset.path)) == told(dataset)


def test_forgetting_removes_the_row_and_the_names_only_that_user_had(tmp_path: Path) -> None:
    rows: Rows = [("a", "germany", "x|y", 1), ("b", "fr", "y", 2)]
    path = prepared(tmp_path, "abc", rows)
    call_verb("forget", [str(path), "a"])
    dataset = open_dataset(path)
    assert told(dataset) == {"b": ("fr", ["y"], 2.0), "c": (None, [], None)}
    assert dataset.vocab["user_country"] == [None, "fr", None]
    assert dataset.vocab["user_tags"] == [None, None, "y"]
    assert dataset.manifest.users_described == 1
    assert [file.name for file in path.glob("users*")] == ["users-00001.parquet"]
    assert not any(b"germany" in file.read_bytes() for file in (path / "vocab").iterdir())


def test_a_view_tells_the_same_of_its_users(tmp_path: Path) -> None:
    path = append(prepared(tmp_path, "ab", FIRST), "acc", SECOND).path
    call_verb("view", [str(path), "--out", str(tmp_path / "view"), "--k-core", "2"])
    assert told(open_dataset(tmp_path / "view")) == told(open_dataset(path))


def test_an_altered_table_is_refused(tmp_path: Path) -> None:
    path = prepared(tmp_path, "ab", FIRST)
    pl.read_parquet(path / "users.parquet").with_columns(age_value=7.0).write_parquet(path / "users.parquet")
    with pytest.raises(RecsysKsaError, match="the file was altered"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("rows", "config", "said"),
    [
        (None, CONFIG, r"expected a table of users \(--users\) .* got no table and country, tags, age"),
        (FIRST, "", "got .*users.parquet and no feature. Give both or neither."),
        (FIRST, '[users]\nuser_id = "who"\nfeatures = ["mood"]', "expected a column 'mood', got who, country"),
        (
            FIRST,
            '[users]\nuser_id = "who"\nfeatures = ["age"]',
            "column 'age': expected strings or int",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused(rows: Rows | None, config: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecsysKsaError, match=said):
        prepared(tmp_path, "ab", rows, config)
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('users.features = ["a-b"]', "expected names of letters"),
        ('users.features = ["a"]\nusers.numbers = ["a"]', "expected each name once"),
        (
            'users.features = ["a"]\nitems.side_features = ["user_a"]',
            "'user_a' is the vocabulary of a feature",
        ),
    ],
)
def test_names_that_cannot_be_files_are_refused(config: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared(tmp_path, "ab", None, config)
