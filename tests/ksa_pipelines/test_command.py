import json
import socket
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from recsys_ksa.cli import main
from recsys_ksa.testing import lifelong_log


@pytest.fixture
def log(tmp_path):
    pq.write_table(lifelong_log(0, 8, 10, median_length=6), tmp_path / "log.parquet")
    return str(tmp_path / "log.parquet")


def test_prepare_tells_its_steps_and_ends_with_the_counts(log, tmp_path, capsys):
    assert main(["prepare", log, "--out", str(tmp_path / "ds")]) == 0
    said = capsys.readouterr()
    assert "8 users" in said.out
    for step in ("read ", "distinct events", "ties: ", "ordered 8 histories", "wrote "):
        assert step in said.err


def test_options_override_the_config(log, tmp_path):
    (tmp_path / "p.toml").write_text('tie = "arrival"\nclock = "unix"\nnum_buckets = 8\nmin_user_events = 1\n')
    options = ["--tie", "hash", "--clock", "relative", "--num-buckets", "2"]

    assert main(["prepare", log, "--out", str(tmp_path / "ds"), "--config", str(tmp_path / "p.toml"), *options]) == 0

    manifest = json.loads((tmp_path / "ds" / "manifest.json").read_text())
    assert (manifest["tie"], manifest["clock"], manifest["num_buckets"]) == ("hash", "relative", 2)
    assert manifest["config"]["min_user_events"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{log}", "--out", "{tmp}"], "does not exist yet"),
        (["{tmp}/none.parquet", "--out", "{tmp}/ds"], "found none"),
        (["{log}", "--out", "{tmp}/ds", "--config", "{tmp}/none.toml"], "none.toml"),
        (["{log}", "--out", "{tmp}/ds", "--config", "{tmp}/typo.toml"], "colums"),
        (["{log}", "--out", "{tmp}/ds", "--num-buckets", "0"], "num_buckets"),
        (["{log}", "--out", "{tmp}/ds", "--items", "{tmp}/none.csv"], "found none"),
        (["{log}"], "--out"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(log, tmp_path, capsys, arguments, said):
    (tmp_path / "typo.toml").write_text('[colums]\nuser_id = "u"\n')

    code = main(["prepare", *(argument.format(log=log, tmp=tmp_path) for argument in arguments)])

    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert said in error[-1]
    assert "Traceback" not in "".join(error)


@pytest.mark.parametrize("table", ["--items", "--users"])
def test_a_missing_table_is_told_before_the_log_is_read(log, tmp_path, capsys, table):
    assert main(["prepare", log, "--out", str(tmp_path / "ds"), table, str(tmp_path / "none.csv")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "none.csv: expected a file" in line


def test_an_address_without_a_ray_cluster_is_refused_at_once(log, tmp_path, capsys):
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listened at
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--engine", "ray", "--ray-address", address]
        assert main(["prepare", log, "--out", str(tmp_path / "ds"), *options]) == 2
    assert f"--ray-address {address}: expected HOST:PORT of a Ray cluster" in capsys.readouterr().err


def test_prepare_runs_where_torch_is_not(log, tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'torchrec', 'faiss', 'mlflow'): sys.modules[name] = None\n"
        "from recsys_ksa.cli import main\n"
        f"code = main(['prepare', {log!r}, '--out', {str(tmp_path / 'ds')!r}])\n"
        "assert 'pandas' not in sys.modules, 'Arrow loaded pandas'\n"
        "from importlib.util import find_spec\n"
        "if find_spec('pandas'): import pandas\n"  # who asks for it still gets it
        "sys.exit(code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "ds" / "manifest.json").is_file()


def test_loading_the_verb_loads_neither_polars_nor_pyarrow():
    heavy = {"polars", "pyarrow", "numpy", "torch"}
    code = f"import sys, ksa_pipelines.commands.prepare\nassert not {heavy} & set(sys.modules)\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
