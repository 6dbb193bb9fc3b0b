"""A small prepared data set and a config that trains on it in seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recsys_ksa.config import RunConfig
from recsys_ksa.data.dataset import Dataset
from recsys_ksa.testing import item_table, lifelong_log, prepared_dataset

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    log = lifelong_log(1, 40, 60, median_length=40, max_length=120, event_types=True)
    return prepared_dataset(tmp_path_factory.mktemp("train"), log, items=item_table(60))


@pytest.fixture
def make_config() -> MakeConfig:
    def make(**sections: dict[str, object]) -> RunConfig:
        base: dict[str, dict[str, object]] = {
            "model": {
                "dim": 16,
                "num_heads": 2,
                "num_kv_heads": 1,
                "head_dim": 8,
                "feed_forward_dim": 16,
                "layers": ["summary", "full"],
                "chunk_size": 4,
                "window_chunks": 1,
                "dropout": 0.2,
                "side_features": ["category"],
                "own_item_bias": True,
            },
            "data": {"max_length": 32},
            "loss": {"num_negatives": 32, "targets": "next-set", "request_time": "drawn"},
            "train": {
                "batch_tokens": 256,
                "warmup_steps": 2,
                "max_steps": 10,
                "validate_every": 4,
                "validation_users": 20,
                "checkpoint_every": 3,
            },
        }
        for name, changes in sections.items():
            base[name] = base.get(name, {}) | changes
        return RunConfig.model_validate(base)

    return make


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[RunConfig], Path]:
    from recsys_ksa.config import dump_config

    def write(config: RunConfig) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(dump_config(config), encoding="utf-8")
        return path

    return write
