"""The command: mistakes end as one line and exit code 2, never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from recsys_ksa import __version__
from recsys_ksa.cli import main, verb_entry_points
from recsys_ksa.commands.config_files import config_file

SMOKE = str(config_file("smoke.toml"))


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
        (["train", SMOKE, "--data", "x", "--out", "y", "--set", "trian.max_steps=3"], "Did you mean 'train'?"),
        (["train", SMOKE, "--data", "x", "--out", "y", "--set", "train.max_stepz=3"], "Did you mean 'max_steps'?"),
        (["train", SMOKE, "--data", "x", "--out", "y", "--set", "model.zzz=3"], "got 'zzz'. There are architecture,"),
        (["ask", "ann", "--url", "http://127.0.0.1:9"], "Is a service there?"),
        (["ask", "ann", "--url", "localhost:8000"], "expected one as http://127.0.0.1:8000, got 'localhost:8000'"),
        (["replay", "x", "--state-dir", "/nowhere"], "expected a service's directory"),
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


def test_times_that_are_no_whole_numbers_are_one_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.csv").write_text("item_id,timestamp\ni1,5\ni2,6.5\n", encoding="utf-8")
    assert main(["recommend", str(tiny_run), "--events", str(tmp_path / "log.csv")]) == 2
    assert "timestamp: expected whole Unix seconds, got '6.5'" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"recsys-ksa {__version__}\n"


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
