"""Each part imports without the packages of the others: accelerator machines have little beyond torch and pyarrow."""

import subprocess
import sys

import pytest

LIBRARY = [
    "recsys_ksa.recommender",
    "recsys_ksa.run",
    "recsys_ksa.model.network",
    "recsys_ksa.train.loop",
    "recsys_ksa.data.dataset",
    "recsys_ksa.retrieval.index",
    "recsys_ksa.evaluate.evaluation",
    "recsys_ksa.commands.evaluate",
]
SERVICE = ["ksa_serving.app", "ksa_serving.service", "ksa_serving.command"]
PIPELINES = ["ksa_pipelines.commands.prepare", "ksa_pipelines.prepare", "recsys_ksa.data.dataset"]


@pytest.mark.parametrize(
    ("modules", "blocked"),
    [
        (LIBRARY, ["polars", "mlflow", "faiss"]),
        (SERVICE, ["polars", "mlflow", "faiss"]),
        (PIPELINES, ["torch"]),
        (["ksa_kernels"], ["recsys_ksa", "numpy.linalg.nothing", "polars", "pyarrow", "pydantic"]),
        (["recsys_ksa", "recsys_ksa.cli", "recsys_ksa.order", "recsys_ksa.features"], ["torch", "polars", "pyarrow"]),
    ],
)
def test_imports_without(modules: list[str], blocked: list[str]) -> None:
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\nimport " + ", ".join(modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
