import gzip
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from ksa_pipelines.config import PrepareConfig
from ksa_pipelines.prepare import prepare
from ksa_pipelines.sources import find_files
from recsys_ksa.errors import DataError, MissingPackageError, SchemaError

CSV = "user_id,item_id,timestamp\n007,x,10\n007,y,20\n8,x,30\n"


def test_csv_gzip_and_parquet_of_one_log_give_one_data_set(prepared, tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    frame = {"user_id": ["007", "007", "8"], "item_id": ["x", "y", "x"], "timestamp": [10, 20, 30]}

    hashes = {prepared(log).manifest.content_hash for log in (tmp_path / "a.csv", tmp_path / "b.csv.gz", frame)}

    assert len(hashes) == 1


FRAME = {"user_id": ["007", "007", "8"], "item_id": ["x", "y", "x"], "timestamp": [10, 20, 30]}
LINES = "".join(
    f'{{"user_id": "{user}", "item_id": "{item}", "timestamp": {time}}}\n' for user, item, time in zip(*FRAME.values())
)


def test_every_format_of_one_log_gives_one_data_set(prepared, tmp_path):
    frame = pl.DataFrame(FRAME)
    frame.write_ipc(tmp_path / "a.arrow")
    (tmp_path / "b.jsonl").write_text(LINES)
    (tmp_path / "c.ndjson.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "d.csv.zst").write_bytes(pa.Codec("zstd").compress(CSV.encode(), asbytes=True))
    (tmp_path / "e.tsv").write_text(CSV.replace(",", "\t"))
    logs = [file for file in sorted(tmp_path.iterdir()) if file.is_file()]
    assert len(logs) == 5
    hashes = {prepared(log).manifest.content_hash for log in (frame, *logs)}
    assert len(hashes) == 1


def test_hive_partitions_are_columns(prepared, tmp_path):
    for kind, day, rows in (("buy", 1, 1), ("see%20it", 2, 2)):
        folder = tmp_path / "log" / f"kind={kind}" / f"day={day}"
        folder.mkdir(parents=True)
        part = {"user_id": ["a"] * rows, "item_id": ["x"] * rows, "timestamp": [day * 100 + row for row in range(rows)]}
        pl.DataFrame(part).write_parquet(folder / "part-0.parquet")
    (tmp_path / "log" / "_SUCCESS").write_text("")

    for log in (tmp_path / "log", Path(f"{tmp_path}/log/*/*/*.parquet")):
        dataset = prepared(log, columns={"event_type": "kind"})
        assert dataset.vocab["event_type"] == [None, "buy", "see it"]
        assert dataset.histories.event_type.tolist() == [1, 2, 2]


def test_a_delta_table_is_read(prepared, tmp_path):
    pytest.importorskip("deltalake")
    pl.DataFrame(FRAME).write_delta(str(tmp_path / "table"))
    assert prepared(tmp_path / "table").manifest.content_hash == prepared(FRAME).manifest.content_hash


def test_an_iceberg_table_is_read(prepared, tmp_path):
    pytest.importorskip("pyiceberg.catalog.sql", exc_type=ImportError)
    from pyiceberg.catalog.sql import SqlCatalog

    (tmp_path / "warehouse").mkdir()
    catalog = SqlCatalog("c", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=f"file://{tmp_path}/warehouse")
    catalog.create_namespace("shop")
    rows = pl.DataFrame(FRAME).to_arrow(compat_level=pl.CompatLevel.oldest())
    catalog.create_table("shop.log", schema=rows.schema).append(rows)
    (metadata,) = (tmp_path / "warehouse").rglob("metadata")
    assert prepared(metadata.parent).manifest.content_hash == prepared(FRAME).manifest.content_hash


@pytest.mark.parametrize(("table", "package"), [("delta", "deltalake"), ("iceberg", "pyiceberg")])
def test_a_table_without_its_package_names_the_extra(prepared, tmp_path, monkeypatch, table, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "log").mkdir()
    with pytest.raises(MissingPackageError, match=rf"recsys-ksa\[{table}\]"):
        prepared(tmp_path / "log", read={"format": table})


def test_an_address_that_does_not_answer_is_one_line(prepared):
    with pytest.raises(DataError, match="cannot be read"):
        prepare("http://127.0.0.1:9/log.parquet", Path("unused"), PrepareConfig(), None, print)


def test_ids_in_csv_keep_their_leading_zeros(prepared, tmp_path):
    (tmp_path / "log.csv").write_text(CSV)
    assert sorted(prepared(tmp_path / "log.csv").histories.user_ids()) == ["007", "8"]


def test_a_folder_and_a_pattern_are_read_in_order_of_name(prepared, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    for name, item in (("b", "second"), ("a", "first"), ("c", "third")):
        pl.DataFrame({"user_id": ["u"], "item_id": [item], "timestamp": [5]}).write_parquet(folder / f"{name}.parquet")
    (folder / "notes.txt").write_text("not a log")
    (folder / "_metadata.parquet").write_text("another engine's")

    for log in (folder, folder / "[abc].parquet"):
        dataset = prepared(Path(log))
        items = [dataset.items.item_id[index] for index in dataset.histories.item_index]
        assert items == ["first", "second", "third"]
        assert [file.name for file in dataset.manifest.logs[0].files] == ["a.parquet", "b.parquet", "c.parquet"]


@pytest.mark.parametrize("name", ["nothing", "none-*.parquet"])
def test_a_missing_log_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="found none"):
        find_files(str(tmp_path / name))


def test_mixed_and_unknown_formats_are_refused(tmp_path):
    for name in ("a.csv", "b.parquet", "c.xml"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match="one format"):
        find_files(str(tmp_path))
    with pytest.raises(DataError, match=r"got c\.xml"):
        find_files(str(tmp_path / "c.xml"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.parquet", b"PAR1 this is no parquet file PAR1"),
        ("cut.parquet", b"PAR1"),
        ("empty.parquet", b""),
        ("empty.csv", b""),
        ("ragged.csv", b"user_id,item_id,timestamp\na,b,1,2,3\n"),
        ("broken.csv.gz", b"\x1f\x8b not gzip"),
    ],
)
def test_a_broken_file_is_one_line(prepared, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, SchemaError)) as caught:
        prepared(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_file_is_one_line(prepared, tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": range(10_000), "item_id": range(10_000), "timestamp": range(10_000)}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"log\.parquet: cannot be read"):
        prepared(path)


def test_files_of_different_columns_are_refused(prepared, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    pl.DataFrame({"user_id": ["a"], "item_id": ["x"], "timestamp": [1]}).write_parquet(folder / "a.parquet")
    pl.DataFrame({"user_id": ["a"], "thing": ["x"], "timestamp": [1]}).write_parquet(folder / "b.parquet")
    with pytest.raises((SchemaError, DataError), match="log"):
        prepared(folder)
