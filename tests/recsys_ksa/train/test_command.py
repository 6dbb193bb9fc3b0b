"""`ksa train` from the outside."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys_ksa.cli import call_verb
from recsys_ksa.config import RunConfig, load_config
from recsys_ksa.data.dataset import Dataset
from recsys_ksa.errors import ConfigError, UsageError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
MakeConfig = Callable[..., RunConfig]
WriteConfig = Callable[[RunConfig], Path]


def test_it_writes_a_run_and_tells_speed_and_state_size(
    dataset: Dataset,
    make_config: MakeConfig,
    config_file: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(config_file(make_config())), "--data", str(dataset.path), "--out", str(tmp_path / "run")]
    call_verb("train", [*arguments, "--set", "train.max_steps=4", "--set", "name=small", "--device", "cpu"])
    told = capsys.readouterr().out
    assert "tokens/s" in told
    assert "state of the longest history, 115 events:" in told
    assert "best validation NDCG@10" in told
    info = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert info["name"] == "small"
    assert (tmp_path / "run" / "vocab" / "category.parquet").exists()
    assert load_config(RunConfig, tmp_path / "run" / "config.toml").train.max_steps == 4
    call_verb("train", [*arguments, "--set", "name=small", "--resume", "--steps", "6"])
    assert "6 steps" in capsys.readouterr().out


def test_bad_input_is_refused(
    dataset: Dataset, make_config: MakeConfig, config_file: WriteConfig, tmp_path: Path
) -> None:
    config = str(config_file(make_config()))
    rest = ["--data", str(dataset.path), "--out", str(tmp_path / "run")]
    with pytest.raises(UsageError, match="--steps: expected 0 or more, got -1"):
        call_verb("train", [config, *rest, "--steps", "-1"])
    with pytest.raises(ConfigError, match=r"model\.chunk_sise"):
        call_verb("train", [config, *rest, "--set", "model.chunk_sise=3"])
    with pytest.raises(ConfigError, match="colour"):
        call_verb("train", [config, *rest, "--set", 'model.side_features=["colour"]', "--steps", "0"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "path",
    sorted(CONFIGS.glob("*.toml")) + sorted(CONFIGS.glob("[!p]*/*.toml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_configs_are_whole_and_valid(path: Path) -> None:
    import tomllib

    config = load_config(RunConfig, path)
    given = tomllib.loads(path.read_text(encoding="utf-8"))
    for section in ("model", "data", "loss", "train", "evaluate"):
        unset = {key for key, value in getattr(config, section).model_dump().items() if value is None}
        if section == "model" and config.model.architecture not in ("sasrec", "hstu"):
            unset.add("max_positions")  # of no meaning to the others
        assert set(getattr(config, section).model_dump()) - set(given[section]) == unset


def test_training_needs_neither_polars_nor_mlflow_nor_faiss(
    dataset: Dataset, make_config: MakeConfig, config_file: WriteConfig, tmp_path: Path
) -> None:
    script = (
        "import sys\n"
        "for name in ('polars', 'mlflow', 'faiss', 'implicit', 'litestar', 'matplotlib'): sys.modules[name] = None\n"
        "from recsys_ksa.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [str(config_file(make_config())), "--data", str(dataset.path), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *arguments, "--steps", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "run.json").exists()
