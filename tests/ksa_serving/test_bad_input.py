"""A user's mistake at the command line ends in one line and exit code 2, whatever the mistake."""

import shlex
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksa_serving.client import Client
from ksa_serving.errors import ClientError
from recsys_ksa.cli import main

NOBODY = "--url http://127.0.0.1:1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that are not what a command expects; the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "one.toml").write_text('[a]\naddress = "127.0.0.1:1"\nadmin = "127.0.0.1:1"\n')
    (tmp_path / "odd.toml").write_text('[a]\naddress = "a..b:1"\nadmin = "127.0.0.1:1"\n')
    good: dict[str, Any] = {"user_id": ["ann", "bob"], "item_id": ["i1", "i2"], "timestamp": [1, 2]}
    for name, column, values in [
        ("nobody", "user_id", ["ann", None]),
        ("nothing", "item_id", ["", "i2"]),
        ("never", "timestamp", [1, None]),
        ("lists", "item_id", [[1], [2]]),
    ]:
        pq.write_table(pa.table({**good, column: values}), tmp_path / f"{name}.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("events nobody.parquet", "expected user_id in every row, got none in row 2"),
        ("events nothing.parquet", "expected item_id in every row, got none in row 1"),
        ("events never.parquet", "expected timestamp in every row"),
        ("events lists.parquet", "text in ids"),
        ("events folder", "expected a .csv or .parquet log"),
        ("events nobody.parquet --url http://127.0.0.1:x", "got none in row 2"),
        ("ask ann --url http://127.0.0.1:x", "expected one as http://"),
        ("ask ann --url http://", "expected one as http://"),
        (f"ask '' {NOBODY}", "user id: expected text"),
        (f"ask \udcff {NOBODY}", "user id: expected text"),
        ("load --url http://127.0.0.1:x", "expected http://HOST:PORT"),
        (f"load --users 0 {NOBODY}", "--users: expected 1 or more, got 0"),
        (f"load --items 0 {NOBODY}", "--items"),
        (f"load --events-per-call 0 {NOBODY}", "--events-per-call"),
        (f"load --recommend -1 {NOBODY}", "--recommend"),
        (f"load --events inf {NOBODY}", "--events"),
        (f"load --seconds nan {NOBODY}", "--seconds"),
        (f"load {NOBODY}", "expected a service"),
        ("shards move nowhere/map.json --processes one.toml", "a folder that is there"),
        ("shards move map.json --processes odd.toml", "expected a table for each process"),
        ('shards move map.json --processes one.toml --reload "\'"', "--reload: expected a command"),
        ("shards plan map.json", "--processes"),
        ("consume t --brokers b:1 --dead-letters folder", "--dead-letters folder: expected a file"),
        ("consume t --brokers b:1 --dead-letters x --kafka y", "--kafka: expected NAME=VALUE"),
        ("serve run --port 0 --state-dir s --releases nowhere --admin-port 0", "--releases nowhere"),
        ("serve run --port 0 --state-dir s --releases folder", "--admin-port beside it"),
        ("serve run --port 0 --state-dir s --set limits.k=x", "--set: limits.k"),
        ("replay run --state-dir folder", "a service's directory"),
    ],
)
def test_it_is_told_in_one_line(folder: Path, command: str, told: str, capsys: pytest.CaptureFixture[str]):
    before = sorted(folder.rglob("*"))
    assert main(shlex.split(command)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[-1], lines
    assert not [line for line in lines if "Traceback" in line]
    assert [path.name for path in sorted(folder.rglob("*")) if path not in before] in ([], ["x"])


@pytest.mark.parametrize(
    "wrong", ["consume '' --brokers b:1", "consume t --brokers ''", "consume t --brokers b:1 --kafka no.such=1"]
)
def test_what_librdkafka_refuses_is_told_in_one_line(folder: Path, wrong: str, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("confluent_kafka")
    assert main(shlex.split(f"{wrong} --dead-letters letters")) == 2
    assert "SourceError: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("token", ["", "se cret", "secret\n", "sécret"])
@pytest.mark.parametrize("command", [f"ask ann {NOBODY}", f"load {NOBODY}", "shards move m --processes one.toml"])
def test_a_token_that_cannot_be_one_is_refused_and_not_shown(
    folder: Path, token: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KSA_TOKEN", token)
    assert main(shlex.split(command)) == 2
    assert "cret" not in (told := capsys.readouterr().err)
    assert "token: expected visible ASCII" in told


def test_what_was_rejected_is_told_with_its_reason(
    shared_client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nann,i1,1\nann,i2,-5\n")
    assert main(["events", str(tmp_path / "log.csv"), "--url", str(shared_client.base_url)]) == 0
    assert "1 accepted, 1 rejected (negative-time)" in capsys.readouterr().out


def test_a_user_id_that_is_none_never_leaves_the_client():
    with Client("http://127.0.0.1:1", tries=1) as client, pytest.raises(ClientError, match="user id") as refused:
        client.forget("")
    assert refused.value.refused
