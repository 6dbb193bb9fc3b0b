from pathlib import Path

import pytest

from ksa_pipelines.config import PrepareConfig
from recsys_ksa.config import dump_config, load_config, parse_config
from recsys_ksa.errors import ConfigError

FILES = sorted((Path(__file__).parents[2] / "configs" / "prepare").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_prepare_file_of_the_project_is_read_and_survives_being_written(path, tmp_path):
    config = load_config(PrepareConfig, path)
    (tmp_path / "copy.toml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(PrepareConfig, tmp_path / "copy.toml") == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"colums": {}}, "colums"),
        ({"clock": "sundial"}, "clock"),
        ({"columns": {"user_id": "id", "item_id": "id"}}, "three columns"),
        ({"num_buckets": 0}, "num_buckets"),
        ({"min_item_count": -1}, "min_item_count"),
        ({"split": {"test_days": 0}}, "test_days"),
        ({"items": {"side_features": ["brand", "brand"]}}, "each name once"),
    ],
)
def test_mistakes_are_refused_by_key(values, said):
    with pytest.raises(ConfigError, match=said):
        parse_config(PrepareConfig, values, "test")
