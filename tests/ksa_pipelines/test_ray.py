"""The Ray engine on this machine's cores; skipped where Ray is not installed."""

import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ksa_pipelines import memory
from ksa_pipelines.append import append_log
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.engine import LocalEngine
from ksa_pipelines.ingest import Resources
from ksa_pipelines.prepare import prepare
from recsys_ksa.cli import main
from recsys_ksa.errors import DataError, SchemaError
from recsys_ksa.testing import lifelong_log

CONFIG = PrepareConfig(num_buckets=3, min_item_count=2)


def said(line: str) -> None:
    """Takes a step's line and drops it."""


@pytest.fixture(scope="module")
def engine():
    ray = pytest.importorskip("ray")
    from ksa_pipelines.ray_engine import RayEngine

    yield RayEngine()
    ray.shutdown()


@pytest.fixture(autouse=True)
def _a_task_a_bucket(monkeypatch):
    monkeypatch.setattr(memory, "TOGETHER", 1)


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    rows = lifelong_log(9, 30, 20, median_length=15, event_types=True)
    for number in range(3):
        pq.write_table(rows.slice(number * 100, 100), folder / f"{number}.parquet")
    return str(folder)


def hashes(manifest) -> tuple:
    return manifest.content_hash, manifest.split_hash, manifest.logs, manifest.files["items.parquet"]


def test_ray_gives_the_same_data_set_as_one_process(engine, log, tmp_path):
    alone = prepare(log, tmp_path / "alone", CONFIG, None, said, Resources(LocalEngine()))
    together = prepare(log, tmp_path / "together", CONFIG, None, said, Resources(engine))
    assert hashes(together) == hashes(alone)


def test_a_log_is_appended_on_ray(engine, log, tmp_path):
    config = PrepareConfig(num_buckets=3)
    pq.write_table(lifelong_log(2, 20, 30, median_length=5, event_types=True), tmp_path / "more.parquet")
    found = []
    for name, resources in (("alone", Resources(LocalEngine())), ("together", Resources(engine))):
        prepare(log, tmp_path / name, config, None, said)
        found.append(append_log(tmp_path / name, str(tmp_path / "more.parquet"), said, resources=resources))
    assert found[0].content_hash == found[1].content_hash


def test_a_killed_worker_is_retried_and_changes_nothing(engine, log, tmp_path):
    class Killing:
        """Kills the worker of every second task, once, after its work is done."""

        workers, processes = engine.workers, engine.processes
        deaths = tmp_path / "deaths"

        def map(self, function, tasks):
            deaths, name = self.deaths, getattr(function, "__name__", "partial")
            deaths.mkdir(exist_ok=True)

            def fragile(numbered):
                number, task = numbered
                result = function(task)
                mark = Path(deaths, f"{name}-{number}")
                if number % 2 == 0 and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return engine.map(fragile, list(enumerate(tasks)))

    alone = prepare(log, tmp_path / "alone", CONFIG, None, said, Resources(LocalEngine()))
    survived = prepare(log, tmp_path / "survived", CONFIG, None, said, Resources(Killing()))
    assert len(list(Killing.deaths.iterdir())) >= 6
    assert hashes(survived) == hashes(alone)


def test_a_mistake_met_by_a_worker_is_the_librarys_error(engine, tmp_path):
    pq.write_table(lifelong_log(0, 3, 3).drop_columns("timestamp"), tmp_path / "log.parquet")
    with pytest.raises(SchemaError, match="expected a column 'timestamp'"):
        prepare(str(tmp_path / "log.parquet"), tmp_path / "ds", CONFIG, None, said, Resources(engine))


def test_a_worker_that_always_dies_is_a_data_error(engine):
    with pytest.raises(DataError, match="it died 4 times"):
        list(engine.map(lambda task: os.kill(os.getpid(), signal.SIGKILL), [1]))


def test_ray_that_is_not_installed_is_named(log, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["prepare", log, "--out", str(tmp_path / "ds"), "--engine", "ray"]) == 2
    assert "recsys-ksa[ray]" in capsys.readouterr().err
