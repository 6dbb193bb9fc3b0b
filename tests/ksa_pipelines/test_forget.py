import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksa_pipelines.append import append_log
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.forget import forget
from ksa_pipelines.prepare import prepare
from recsys_ksa.cli import main
from recsys_ksa.config import parse_config
from recsys_ksa.data.cache import read_parts
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.errors import DataError
from recsys_ksa.testing import item_table, lifelong_log

LOG = {
    "user_id": ["anna", "anna", "bert", "anna", "bert"],
    "item_id": ["x", "only-annas", "x", "y", "y"],
    "timestamp": [10, 20, 30, 90, 80],
    "event_type": ["see", "secret", "see", "see", "buy"],
}


def said(line: str) -> None:
    """Takes a step's line and drops it."""


def bytes_of(path: Path) -> bytes:
    """Everything under a folder; Parquet as text, since it is compressed."""
    raw = [str(path.name).encode()]
    for file in sorted(path.rglob("*")):
        if file.is_file():
            raw.append(
                str(pl.read_parquet(file).to_dicts()).encode() if file.suffix == ".parquet" else file.read_bytes()
            )
    return b"".join(raw)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 11), st.sampled_from(["arrival", "hash"]))
def test_what_is_left_is_a_replay_without_the_user_by_the_same_numbers(seed, users, tie):
    log = pl.DataFrame(lifelong_log(seed, users + 1, 30, median_length=5, event_types=True))
    gone = f"u{seed % (users + 1)}"
    config = parse_config(
        PrepareConfig, {"num_buckets": 3, "tie": tie, "items": {"side_features": ["category"]}}, "test"
    )
    with tempfile.TemporaryDirectory() as folder:
        full, without = Path(folder) / "full", Path(folder) / "without"
        pl.DataFrame(item_table(30)).write_parquet(Path(folder) / "items.parquet")
        half = log.height // 2
        log.head(max(half, 1)).write_parquet(Path(folder) / "a.parquet")
        log.tail(log.height - max(half, 1)).write_parquet(Path(folder) / "b.parquet")
        prepare(str(Path(folder) / "a.parquet"), full, config, str(Path(folder) / "items.parquet"), said)
        if log.height > 1:
            append_log(full, str(Path(folder) / "b.parquet"), said, items=str(Path(folder) / "items.parquet"))
        if open_dataset(full).histories.user_ids() == [gone]:
            return
        forget(full, [gone], said)
        log.filter(pl.col("user_id") != gone).write_parquet(Path(folder) / "rest.parquet")
        prepare(str(Path(folder) / "rest.parquet"), without, config, str(Path(folder) / "items.parquet"), said)

        mine, other = open_dataset(full), open_dataset(without)
        names = mine.items.item_id
        described = {i: n for n, i in enumerate(names) if i is not None}
        assert set(described) == set(other.item_index)
        for name, index in other.item_index.items():
            at = described[name]
            assert mine.items.count[at] == other.items.count[index]
            assert mine.items.first_seen[at] == other.items.first_seen[index]
            theirs = other.vocab["category"][other.items.side["category"][index]]
            assert mine.vocab["category"][mine.items.side["category"][at]] == theirs
        assert set(mine.vocab["event_type"]) == set(other.vocab["event_type"])
        assert mine.manifest.split == other.manifest.split

        def spoken(dataset) -> dict:
            rows = read_parts(dataset.path, dataset.manifest).to_pylist()
            return {
                row["user_id"]: (
                    [dataset.items.item_id[item] for item in row["item_index"]],
                    row["timestamp"],
                    [dataset.vocab["event_type"][kind] for kind in row["event_type"]],
                    row["global_test"],
                    row["loo_test"],
                )
                for row in rows
            }

        assert spoken(mine) == spoken(other)


def test_nothing_of_a_forgotten_user_is_left_on_disk(prepared, tmp_path):
    dataset = prepared(LOG | {"user_id": ["anna", "anna", "bert", "anna", "bert"], "timestamp": [10, 20, 30, -5, 80]})
    assert b"anna" in bytes_of(dataset.path)
    pl.DataFrame({name: column[:2] for name, column in LOG.items()}).write_parquet(tmp_path / "again.parquet")
    append_log(dataset.path, str(tmp_path / "again.parquet"), said)

    after = forget(dataset.path, ["anna"], said)

    left = bytes_of(dataset.path)
    for trace in (b"anna", b"only-annas", b"secret"):
        assert trace not in left
    now = open_dataset(dataset.path)
    assert now.histories.user_ids() == ["bert"]
    assert now.items.item_id == [None, "x", None, "y"]
    assert now.vocab["event_type"] == [None, "buy", None, "see"]
    assert after.counts.users == 1
    assert not (dataset.path / "manifests").exists()


def test_a_forgotten_user_does_not_come_back(prepared, tmp_path):
    dataset = prepared(LOG)
    lines: list[str] = []
    forget(dataset.path, ["anna", "never-seen"], lines.append)
    assert "not in the data set, refused in later logs all the same: never-seen" in lines
    again = {"user_id": ["anna", "never-seen", "carl"], "item_id": ["x", "only-annas", "only-annas"]}
    pl.DataFrame(again | {"timestamp": [100, 101, 102], "event_type": ["see"] * 3}).write_parquet(
        tmp_path / "b.parquet"
    )

    after = append_log(dataset.path, str(tmp_path / "b.parquet"), said)

    assert after.logs[1].rejected == {"forgotten user": 2}
    now = open_dataset(dataset.path)
    assert sorted(now.histories.user_ids()) == ["bert", "carl"]
    assert now.items.item_id == [None, "x", None, "y", "only-annas"]  # a new item by a new number
    assert b"anna" not in bytes_of(dataset.path / "quarantine")


def test_numbers_of_forgotten_users_are_not_given_again(prepared, tmp_path):
    dataset = prepared(LOG, num_buckets=1)
    numbers = dict(zip(dataset.histories.user_ids(), dataset.histories.user_index.tolist()))
    assert numbers == {"anna": 0, "bert": 1}
    forget(dataset.path, ["bert"], said)
    pl.DataFrame(LOG | {"user_id": ["carl"] * 5}).write_parquet(tmp_path / "b.parquet")
    append_log(dataset.path, str(tmp_path / "b.parquet"), said)
    assert open_dataset(dataset.path).histories.user_index.tolist() == [0, 2]


def test_an_empty_id_is_nobodys(prepared, capsys):
    dataset = prepared(LOG)
    assert main(["forget", str(dataset.path), ""]) == 2
    assert "got an empty one" in capsys.readouterr().err
    assert open_dataset(dataset.path).manifest.version == 0


def test_forgetting_everybody_is_refused_and_changes_nothing(prepared):
    dataset = prepared(LOG)
    with pytest.raises(DataError, match="nobody would"):
        forget(dataset.path, ["anna", "bert"], said)
    assert open_dataset(dataset.path).histories.num_users == 2
