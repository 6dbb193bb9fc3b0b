"""What an event was worth comes along from the log to the loader's copy, through every change of a data set."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys_ksa.cli import call_verb
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.errors import SchemaError

CONFIG = '[columns]\nvalue = "rating"\n'
Event = tuple[str, str, int]


def draw(rng: np.random.Generator, rows: int, start: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in rng.integers(0, 9, rows)],
            "item_id": [f"i{n}" for n in rng.integers(0, 9, rows)],
            "timestamp": start + rng.permutation(rows),
            "rating": [None if share < 0.2 else float(round(share * 10)) / 2 for share in rng.random(rows)],
        }
    )


def held(dataset: Dataset) -> dict[Event, float | None]:
    histories = dataset.histories
    assert histories.value is not None
    users = np.repeat(np.array(histories.user_ids()), histories.lengths)
    items = [dataset.items.item_id[index] for index in histories.item_index]
    worth = [None if np.isnan(value) else float(value) for value in histories.value]
    return dict(zip(zip(users.tolist(), items, histories.timestamp.tolist()), worth))  # type: ignore[arg-type]


def sent(*logs: pl.DataFrame) -> dict[Event, float | None]:
    rows = pl.concat(logs).iter_rows()
    return {(user, item, time): value for user, item, time, value in rows}


def prepared(folder: Path, log: pl.DataFrame, config: str = CONFIG) -> Path:
    log.write_parquet(folder / "log.parquet")
    (folder / "prepare.toml").write_text(config)
    arguments = ["--config", str(folder / "prepare.toml"), "--out", str(folder / "ds")]
    call_verb("prepare", [str(folder / "log.parquet"), *arguments])
    return folder / "ds"


def test_values_come_along_through_appends_views_and_deletions(tmp_path: Path, rng: np.random.Generator) -> None:
    first, second = draw(rng, 200, 1_600_000_000), draw(rng, 80, 1_600_000_150)
    path = prepared(tmp_path, first)
    assert held(open_dataset(path)) == sent(first)
    second = second.filter(~pl.col("timestamp").is_in(first["timestamp"].implode()))
    second.write_parquet(tmp_path / "more.parquet")
    call_verb("append-log", [str(path), str(tmp_path / "more.parquet")])
    assert held(open_dataset(path)) == sent(first, second)
    call_verb("compact", [str(path)])
    assert held(open_dataset(path)) == sent(first, second)
    call_verb("view", [str(path), "--out", str(tmp_path / "view"), "--max-user-events", "1000"])
    assert held(open_dataset(tmp_path / "view")) == sent(first, second)
    call_verb("forget", [str(path), "u3"])
    left = {event: value for event, value in sent(first, second).items() if event[0] != "u3"}
    assert held(open_dataset(path)) == left


def test_the_content_hash_knows_values_and_data_sets_without_them_have_none(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    log = draw(rng, 50, 1_600_000_000)
    hashes = []
    for name, rows, config in (
        ("one", log, CONFIG),
        ("other", log.with_columns(rating=pl.lit(1.0)), CONFIG),
        ("none", log, ""),
        ("plain", log.drop("rating"), ""),
    ):
        (tmp_path / name).mkdir()
        dataset = open_dataset(prepared(tmp_path / name, rows, config))
        assert (dataset.histories.value is not None) == bool(config) == dataset.manifest.has_value
        hashes.append(dataset.manifest.content_hash)
    assert len(set(hashes)) == 3
    assert hashes[2] == hashes[3]


def test_a_log_without_the_column_of_values_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = prepared(tmp_path, draw(rng, 50, 1_600_000_000))
    draw(rng, 20, 1_600_000_100).drop("rating").write_parquet(tmp_path / "more.parquet")
    with pytest.raises(SchemaError, match="expected a column 'rating'"):
        call_verb("append-log", [str(path), str(tmp_path / "more.parquet")])
    (tmp_path / "wrong").mkdir()
    with pytest.raises(SchemaError, match="column 'rating': expected numbers, got Boolean"):
        prepared(tmp_path / "wrong", draw(rng, 20, 1).with_columns(rating=pl.lit(value=True)))
