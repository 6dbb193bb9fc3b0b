"""Each kind of bad input has one outcome, and the version that was there stays as it was, byte by byte."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksa_pipelines.append import append_log
from recsys_ksa.cli import main
from recsys_ksa.data.dataset import open_dataset

GOOD = {"user_id": ["a", "b"] * 50, "item_id": ["x", "y"] * 50, "timestamp": list(range(100))}


def said(line: str) -> None:
    """Takes a step's line and drops it."""


def frame(**columns) -> pl.DataFrame:
    return pl.DataFrame({name: column[:3] for name, column in GOOD.items()} | columns)


def write_truncated(path: Path) -> None:
    pl.DataFrame(GOOD).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-40])


def write_truncated_in_the_middle(path: Path) -> None:
    pl.DataFrame({name: column * 5_000 for name, column in GOOD.items()}).write_parquet(
        path, compression="uncompressed"
    )
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 3] + raw[len(raw) // 2 :])


def write_invalid_utf8_parquet(path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"user_id": bad, "item_id": ["x"], "timestamp": [1]}), path)


REFUSED = {
    "truncated.parquet": (write_truncated, "cannot be read"),
    "damaged.parquet": (write_truncated_in_the_middle, "cannot be read"),
    "empty.parquet": (lambda path: frame().clear().write_parquet(path), "the log has no rows"),
    "empty.csv": (lambda path: path.write_text("user_id,item_id,timestamp\n"), "the log has no rows"),
    "nothing.csv": (lambda path: path.write_text(""), "cannot be read"),
    "type.parquet": (lambda path: frame(user_id=[1.5, 2.5, 3.5]).write_parquet(path), "expected strings or integers"),
    "time.parquet": (lambda path: frame(timestamp=[True, False, True]).write_parquet(path), "expected integers"),
    "milliseconds.csv": (
        lambda path: path.write_text("user_id,item_id,timestamp\na,x,1700000000000\n"),
        "milliseconds",
    ),
    "utf8.csv": (lambda path: path.write_bytes(b"user_id,item_id,timestamp\na\xff,x,1\n"), "cannot be read"),
    "utf8.parquet": (write_invalid_utf8_parquet, "cannot be read"),
    "broken.jsonl": (lambda path: path.write_text('{"user_id": "a", "item_id"\n'), "cannot be read"),
}


def contents(path: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != ".lock"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_bad_log_is_refused_in_one_line_and_nothing_changes(prepared, tmp_path, capsys, name):
    path = prepared(GOOD).path
    before = contents(path)
    write, message = REFUSED[name]
    write(tmp_path / name)

    assert main(["prepare", str(tmp_path / name), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert name in error
    assert not (tmp_path / "new").exists()

    assert main(["append-log", str(path), str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert contents(path) == before


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"user_id": [1, 2, 3]}, "b.parquet has user_id (integer)"),
        ({"event_type": ["v", "v", "v"]}, "event_type (text)"),
    ],
)
def test_files_of_one_log_that_disagree_are_refused(tmp_path, capsys, second, message):
    (tmp_path / "log").mkdir()
    frame().write_parquet(tmp_path / "log" / "a.parquet")
    frame(**second).write_parquet(tmp_path / "log" / "b.parquet")
    assert main(["prepare", str(tmp_path / "log"), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "expected the same columns and types in every file" in error
    assert message in error


def test_bad_rows_go_to_quarantine_with_their_reason_and_the_rest_stays(prepared, tmp_path):
    path = prepared(GOOD).path
    huge = "u" * 10_000_000
    rows = [
        ("a", "new", 500, "kept"),
        (huge, "x", 501, "user_id over 1,024 bytes"),
        ("a", huge, 502, "item_id over 1,024 bytes"),
        ("a", "x", -3, "negative timestamp"),
        ("a", "x", 4_102_444_801, "far-future timestamp"),
        (None, "x", 5, "null user_id"),
    ]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "why"], orient="row")
    log.drop("why").write_parquet(tmp_path / "log.parquet")

    after = append_log(path, str(tmp_path / "log.parquet"), said)

    assert after.counts.events == 101
    assert sum(after.logs[1].rejected.values()) == 5
    kept = pl.read_parquet(path / "quarantine" / "log-00001.parquet")
    assert kept["reason"].to_list() == [why for *_, why in rows[1:]]
    assert kept["row"].to_list() == [1, 2, 3, 4, 5]
    assert kept["user_id"].str.len_chars().max() == 256
    assert "quarantine/log-00001.parquet" in after.files


def test_a_full_disk_is_one_line_and_nothing_changes(prepared, tmp_path):
    """The limit on file sizes stands for the disk: writing fails midway."""
    path = prepared(GOOD).path
    before = contents(path)
    big = {name: [f"{value}-{n}" for n, value in enumerate(column * 900)] for name, column in GOOD.items()}
    pl.DataFrame(big | {"timestamp": list(range(len(big["user_id"])))}).write_parquet(tmp_path / "log.parquet")
    code = "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"
    for arguments in (
        ["append-log", str(path), str(tmp_path / "log.parquet")],
        ["prepare", str(tmp_path / "log.parquet"), "--out", str(tmp_path / "new")],
    ):
        ended = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert ended.returncode == 2, ended.stderr
        assert "expected to write it" in ended.stderr.splitlines()[-1]
    assert contents(path) == before
    assert not (tmp_path / "new").exists()
    assert open_dataset(path).histories.num_events == 100


def test_a_log_too_large_for_the_memory_is_refused_with_what_would_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ksa_pipelines.memory.BYTES_PER_EVENT", 50_000_000)
    pl.DataFrame(GOOD).write_parquet(tmp_path / "log.parquet")
    assert main(["prepare", str(tmp_path / "log.parquet"), "--out", str(tmp_path / "ds"), "--memory", "1GiB"]) == 2
    assert "--num-buckets" in capsys.readouterr().err
    assert main(["prepare", str(tmp_path / "log.parquet"), "--out", str(tmp_path / "ds"), "--memory", "lots"]) == 2
    assert "expected a size such as 4GiB" in capsys.readouterr().err
