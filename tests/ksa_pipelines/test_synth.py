import numpy as np
import polars as pl
import pytest

from ksa_pipelines.memory import Memory
from ksa_pipelines.synth import SynthConfig, blocks, synthesize
from recsys_ksa.cli import main
from recsys_ksa.errors import UsageError


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    target = tmp_path_factory.mktemp("synth") / "log"
    config = SynthConfig(events=600_000, seed=3, items=5_000, event_types=True, event_ids=True)
    parts = list(synthesize(config, target))
    assert parts[-1] == 600_000
    assert len(list(target.iterdir())) == len(parts) > 1
    return pl.read_parquet(target / "*.parquet")


def test_a_synthetic_log_has_the_shape_that_is_promised(log):
    assert log.height == 600_000
    lengths = log["user_id"].value_counts()["count"].to_numpy()
    assert 40 < np.median(lengths) < 80
    assert lengths.max() > 20 * np.median(lengths)
    popular = log["item_id"].value_counts(sort=True)["count"].to_numpy()
    assert popular[0] > 20 * popular[len(popular) // 2]
    day = (log["timestamp"] // 86_400 % 7).value_counts(sort=True)["count"].to_numpy()
    hour = (log["timestamp"] // 3_600 % 24).value_counts(sort=True)["count"].to_numpy()
    assert day[0] > 1.5 * day[-1]
    assert hour[0] > 5 * hour[-1]
    assert log["event_id"].n_unique() == log.height
    assert set(log["event_type"]) == {"view", "cart", "buy"}


def test_users_repeat_their_items_and_tastes_drift(log):
    user = log.filter(pl.len().over("user_id") > 500).sort("user_id", "timestamp", maintain_order=True)
    repeats = user.select(1 - pl.struct("user_id", "item_id").is_first_distinct().mean()).item()
    assert repeats > 0.35
    number = pl.col("item_id").str.slice(1).cast(pl.Int64)
    at = pl.col("timestamp").rank("ordinal").over("user_id") / pl.len().over("user_id")
    halves = user.with_columns(number=number, late=at > 0.5).group_by("user_id", "late").agg(pl.col("number").median())
    moved = halves.group_by("user_id").agg((pl.col("number").max() - pl.col("number").min()).alias("by"))["by"].median()
    assert moved is not None
    assert moved > 50  # type: ignore[operator]


def test_the_same_seed_gives_the_same_log_and_another_does_not(tmp_path):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert main(["synth", "--out", str(tmp_path / name), "--events", "3000", "--seed", seed]) == 0
    a, b, c = (pl.read_parquet(tmp_path / name / "*.parquet") for name in "abc")
    assert a.equals(b)
    assert not a.equals(c)


def test_histories_are_as_long_as_asked_for():
    config = SynthConfig(events=400_000, median_length=90_000, length_spread=1.0, seed=1)
    lengths = np.concatenate([np.unique(block.user, return_counts=True)[1] for block in blocks(config)])
    assert lengths.max() == 100_000


@pytest.mark.parametrize("name", ["--events", "--items", "--days", "--median-length"])
def test_a_log_of_nothing_is_refused(tmp_path, capsys, name):
    assert main(["synth", "--out", str(tmp_path / "log"), name, "0"]) == 2
    assert f"{name}: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("4GiB", 4 << 30), ("1.5 gb", 3 << 29), ("900M", 900 << 20), ("2147483648", 2 << 30)]
)
def test_a_memory_is_a_number_and_a_unit(text, num_bytes):
    assert Memory.parse(text).num_bytes == num_bytes


@pytest.mark.parametrize("text", ["", "4 bytes please", "-4GiB", "100MiB"])
def test_another_memory_is_refused(text):
    with pytest.raises(UsageError, match="--memory: expected"):
        Memory.parse(text)
