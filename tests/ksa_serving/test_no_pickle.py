"""Nothing that is loaded can run code: no module can unpickle, and a run with pickled weights is refused unread."""

import ast
import pickle
import shutil
from pathlib import Path

import pytest

from ksa_serving.release import load_release
from recsys_ksa.errors import ConfigError, RunError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("recsys_ksa", "kernels/ksa_kernels", "pipelines/ksa_pipelines", "serving/ksa_serving")
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"torch.load", "numpy.load", "np.load", "mlflow.pyfunc.load_model", "eval", "exec"}


def test_no_module_can_unpickle():
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 150
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: set[str] = set()
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names} & MODULES
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]} & MODULES
            elif isinstance(node, ast.Call):
                names = {ast.unparse(node.func)} & CALLS
            assert not names, f"{file.relative_to(ROOT)}, line {getattr(node, 'lineno', 0)}: {names}"


class Trap:
    """What is unpickled from it makes a file."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


@pytest.mark.parametrize("name", ["model.safetensors", "items.parquet", "run.json", "config.toml"])
def test_a_run_with_pickled_content_is_refused_unread(tiny_run: Path, tmp_path: Path, name: str):
    run, made = tmp_path / "run", tmp_path / "made"
    shutil.copytree(tiny_run, run)
    (run / name).write_bytes(pickle.dumps(Trap(made)))
    with pytest.raises((RunError, ConfigError)):
        load_release(run)
    assert not made.exists()
    pickle.loads((run / name).read_bytes())
    assert made.exists()  # what the trap is worth
