"""Content hashes identify data: they must not move with the way a log is worked on, nor with a version of the code."""

import polars as pl
import pytest

from ksa_pipelines import ingest, memory
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.engine import LocalEngine
from ksa_pipelines.ingest import Resources
from ksa_pipelines.prepare import prepare
from recsys_ksa.data import parts
from recsys_ksa.testing import lifelong_log

NUMBERS = range(200)
LOG = {
    "user_id": [f"u{n * n % 17}" for n in NUMBERS],
    "item_id": [f"i{n * 7 % 31}" for n in NUMBERS],
    "timestamp": [1_600_000_000 + n * n * 3_571 % 9_999_999 // 60 * 60 for n in NUMBERS],
    "event_type": [("see", "buy", None)[n % 3] for n in NUMBERS],
    "event_id": [None if n % 5 == 0 else f"e{n * 13 % 180}" for n in NUMBERS],
}
PLAIN_SPLIT = "7b1995ca3300d7a20f8065c42192726c74fba0ddc8a72f3ae8866507eaad269f"
SPLIT = "a4c10f24da6801c05cf7385f5d00d505fef27cc576cbd2bff2a2af398ad02148"
FROZEN = {
    ("arrival", 3): ("922b86d5b3490756a8f0f6995398eb04caf6da7f00adcb94fb544d327417baab", PLAIN_SPLIT),
    ("arrival", 5): ("e0fa0974dd3fa6b9ac43746d65b0f7e2646a618995357c95d9234b673e4bacca", SPLIT),
    ("hash", 3): ("18f236e3c472058fd602c29090817c4082ab262087ddb3008dbb0c70bfef2507", PLAIN_SPLIT),
    ("hash", 5): ("5e08bb4099d0a90b1987bdedeef99c1e1e2bc8f8a2523a7098c72dfd373d1eee", SPLIT),
    ("id", 5): ("d0143654181b5d1223b74917c6cda3a3d71efd33894449c34f0f73ef7ffdde35", SPLIT),
}


def said(line: str) -> None:
    """Takes a step's line and drops it."""


@pytest.mark.parametrize(("tie", "columns"), sorted(FROZEN))
def test_hashes_are_those_of_format_version_1(prepared, tie, columns):
    log = {name: LOG[name] for name in list(LOG)[:columns]}
    manifest = prepared(log, tie=tie, num_buckets=5).manifest
    assert (manifest.content_hash, manifest.split_hash) == FROZEN[tie, columns]


def test_chunks_blocks_row_groups_and_workers_do_not_change_a_data_set(tmp_path, monkeypatch):
    pl.DataFrame(lifelong_log(3, 50, 40, median_length=15, event_types=True)).write_parquet(tmp_path / "log.parquet")
    config = PrepareConfig(num_buckets=7, min_item_count=2)
    one = prepare(str(tmp_path / "log.parquet"), tmp_path / "one", config, None, said, Resources(LocalEngine(1)))

    monkeypatch.setattr(memory.Memory, "chunk_rows", lambda self, workers: 50)
    monkeypatch.setattr(parts, "BLOCK_EVENTS", 40)
    monkeypatch.setattr("ksa_pipelines.write.ROW_GROUP_EVENTS", 30)
    assert ingest.Resources().memory.chunk_rows(1) == 50
    other = prepare(str(tmp_path / "log.parquet"), tmp_path / "other", config, None, said, Resources(LocalEngine(3)))

    assert (one.content_hash, one.split_hash, one.logs) == (other.content_hash, other.split_hash, other.logs)
    assert one.files["items.parquet"] == other.files["items.parquet"]
    caches = [(tmp_path / name / "cache" / "histories.arrow").read_bytes() for name in ("one", "other")]
    assert caches[0] == caches[1]
