import sys
from functools import partial

import polars as pl
import pytest

from ksa_pipelines.engine import LocalEngine
from ksa_pipelines.watched_engine import WatchedEngine
from recsys_ksa.cli import main


def add(number: int, other: int) -> int:
    return number + other


def test_a_watched_engine_gives_what_the_other_gives_under_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    engine = WatchedEngine(LocalEngine(2))
    assert (engine.workers, engine.processes) == (2, 1)
    assert list(engine.map(partial(add, other=5), range(4))) == [5, 6, 7, 8]
    assert "add" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_show_on_a_terminal_alone(tmp_path, capsys, monkeypatch, terminal):
    log = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "x"], "timestamp": [10, 20]})
    log.write_parquet(tmp_path / "log.parquet")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["prepare", str(tmp_path / "log.parquet"), "--out", str(tmp_path / "ds")]) == 0
    assert ("write buckets" in capsys.readouterr().err) == terminal
