"""The command: mistakes end as one line and exit code 2, never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from recsys_ksa.cli import main, verb_entry_points


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fly"], "expected a verb"),
        (["index"], "RUN"),
        (["index", "/nowhere"], "expected a run directory"),
        (["recommend", "/nowhere", "--events", "/nowhere.csv"], "/nowhere.csv"),
        (["recommend", "/nowhere", "--events", "x", "--k", "many"], "--k"),
        (["train", "/nowhere.toml", "--data", "x", "--out", "y"], "/nowhere.toml"),
        (["prepare", "/nowhere.parquet", "--out", "/tmp/never-made"], "/nowhere.parquet"),
        (["evaluate", "/nowhere", "--data", "/nodata", "--tracking", "none"], "/no"),
        (["serve", "/nowhere", "--port", "0", "--state-dir", "/tmp/never-made"], "/nowhere"),
        (["demo", "--steps", "0"], "--steps"),
    ],
)
def test_mistakes_end_as_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


def test_help_shows_one_example_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    verbs = set(verb_entry_points())
    assert {"prepare", "train", "evaluate", "index", "recommend", "serve", "demo", "doctor"} <= verbs
    for name in verbs:
        assert f"ksa {name}" in shown


def test_doctor_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torchrec" in shown
    assert "impl=auto is" in shown


@pytest.mark.parametrize(
    ("verb", "heavy"),
    [("prepare", ["torch", "mlflow", "faiss"]), ("doctor", ["torch", "polars"]), ("train", ["torch", "polars"])],
)
def test_help_of_a_verb_loads_nothing_heavy(verb: str, heavy: list[str]) -> None:
    code = (
        "import sys; from recsys_ksa.cli import main\n"
        f"try: main([{verb!r}, '--help'])\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_recommend_answers_from_a_file(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = tmp_path / "events.csv"
    events.write_text("item_id,timestamp,event_type\ni1,1600000000,\ni2,1600000500,view\n", encoding="utf-8")
    assert main(["recommend", str(tiny_run), "--events", str(events), "--k", "3"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 4
    events.write_text("item,timestamp\ni1,1600000000\n", encoding="utf-8")
    assert main(["recommend", str(tiny_run), "--events", str(events)]) == 2
    assert "got the columns item, timestamp" in capsys.readouterr().err
    events.write_text("item_id,timestamp\ni1,yesterday\n", encoding="utf-8")
    assert main(["recommend", str(tiny_run), "--events", str(events)]) == 2
    assert "yesterday" in capsys.readouterr().err
