"""Content hashes identify data: they must not move with the way a log is worked on, nor with a version of the code."""

import hashlib
import struct

import polars as pl
import pytest

from ksa_pipelines import ingest, memory
from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.engine import LocalEngine
from ksa_pipelines.ingest import Resources
from ksa_pipelines.prepare import prepare
from recsys_ksa.data import cache
from recsys_ksa.data.cache import read_parts
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
    ("arrival", 3): ("15dfd489406910a6efe7752eadd598925e79b46b996dc90afc1fbf76ab24254f", PLAIN_SPLIT),
    ("arrival", 5): ("74e71add225e0b7e15feedda1f83b8e019d27ed1d270b8f04bdb31ad9f2482ce", SPLIT),
    ("hash", 3): ("eaa4771491c967e70d9225df004861dc8a0e37dcc611259b82bbf688ff202270", PLAIN_SPLIT),
    ("hash", 5): ("4221f98917b48817fbcc251f50e8445412f0a51e3114424298a112a24f79fd22", SPLIT),
    ("id", 5): ("ca187531ad8d01ed2da7a95a2b6688f3e7bd20016274ccdfb46948bae87ef72f", SPLIT),
}


def said(line: str) -> None:
    """Takes a step's line and drops it."""


@pytest.mark.parametrize(("tie", "columns"), sorted(FROZEN))
def test_hashes_are_those_of_format_version_2(prepared, tie, columns):
    log = {name: LOG[name] for name in list(LOG)[:columns]}
    manifest = prepared(log, tie=tie, num_buckets=5).manifest
    assert (manifest.content_hash, manifest.split_hash) == FROZEN[tie, columns]


def row_bytes(row: dict, names: list[str]) -> bytes:
    """A user's row as `hashes.row_digests` says it is."""

    def texts(values: list[bytes]) -> bytes:
        return b"".join([struct.pack("<q", len(value)) for value in values]) + b"".join(values)

    user = row["user_id"].encode()
    raw = struct.pack("<3q", row["user_index"], len(row["item_index"]), len(user)) + user
    for name in names:
        if name in ("tie", "event_id"):
            raw += texts([value if isinstance(value, bytes) else (value or "").encode() for value in row[name]])
        else:
            kind = {"item_index": "i", "timestamp": "q", "event_type": "b"}[name]
            raw += struct.pack(f"<{len(row[name])}{kind}", *row[name])
    return raw


@pytest.mark.parametrize("columns", [3, 4, 5])
def test_the_content_hash_is_one_over_the_digests_of_rows(prepared, columns):
    dataset = prepared({name: LOG[name] for name in list(LOG)[:columns]}, num_buckets=5)
    rows = read_parts(dataset.path, dataset.manifest).to_pylist()
    names = [name for name in ("item_index", "timestamp", "tie", "event_id", "event_type") if name in rows[0]]
    expected = hashlib.sha256(f"recsys-ksa histories 2\n{','.join(names)}\n".encode())
    for row in rows:
        expected.update(hashlib.sha256(row_bytes(row, names)).digest())
    assert dataset.manifest.content_hash == expected.hexdigest()


def test_chunks_blocks_row_groups_and_workers_do_not_change_a_data_set(tmp_path, monkeypatch):
    pl.DataFrame(lifelong_log(3, 50, 40, median_length=15, event_types=True)).write_parquet(tmp_path / "log.parquet")
    config = PrepareConfig(num_buckets=7, min_item_count=2)
    one = prepare(str(tmp_path / "log.parquet"), tmp_path / "one", config, None, said, Resources(LocalEngine(1)))

    monkeypatch.setattr(memory.Memory, "chunk_rows", lambda self, workers: 50)
    monkeypatch.setattr(cache, "BLOCK_EVENTS", 40)
    monkeypatch.setattr("ksa_pipelines.write.ROW_GROUP_EVENTS", 30)
    assert ingest.Resources().memory.chunk_rows(1) == 50
    other = prepare(str(tmp_path / "log.parquet"), tmp_path / "other", config, None, said, Resources(LocalEngine(3)))

    assert (one.content_hash, one.split_hash, one.logs) == (other.content_hash, other.split_hash, other.logs)
    assert one.files["items.parquet"] == other.files["items.parquet"]
    caches = [(tmp_path / name / "cache" / "histories.arrow").read_bytes() for name in ("one", "other")]
    assert caches[0] == caches[1]
