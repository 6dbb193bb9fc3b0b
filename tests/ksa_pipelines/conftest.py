import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.prepare import prepare
from recsys_ksa.config import parse_config
from recsys_ksa.data.dataset import Dataset, open_dataset

EVENTS = {"user_id": ["a", "a", "b", "a"], "item_id": ["x", "y", "x", "z"], "timestamp": [10, 20, 30, 40]}
"""A log of four events, each at its own time."""


def said(line: str) -> None:
    """Takes a step's line and drops it."""


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Dataset]:
    """Prepare a frame (written as Parquet) or a path, and open the result; config as keyword arguments."""
    made = []

    def make(log: object, *, catalogue: dict | None = None, **config: object) -> Dataset:
        folder = tmp_path / f"prepared-{len(made)}"
        made.append(folder)
        folder.mkdir()
        if not isinstance(log, Path):
            pl.DataFrame(log).write_parquet(folder / "log.parquet")
            log = folder / "log.parquet"
        if catalogue is not None:
            pl.DataFrame(catalogue).write_parquet(folder / "items.parquet")
        parsed = parse_config(PrepareConfig, {"num_buckets": 4} | config, "test")
        prepare(str(log), folder / "ds", parsed, str(folder / "items.parquet") if catalogue else None, said)
        return open_dataset(folder / "ds")

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data sets, or a skip."""
    folder = Path(os.environ.get("KSA_REALDATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there and KSA_REALDATA names no folder")
    return folder
