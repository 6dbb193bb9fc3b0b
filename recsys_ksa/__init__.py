"""Sequential recommendation over lifelong histories with summary attention.

Importing this package imports nothing heavy; names are loaded when first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recsys_ksa.errors import OutOfOrderError, RecsysKsaError
    from recsys_ksa.model.state import UserState
    from recsys_ksa.recommender import Recommender

_HOMES = {
    "Recommender": "recsys_ksa.recommender",
    "UserState": "recsys_ksa.model.state",
    "OutOfOrderError": "recsys_ksa.errors",
    "RecsysKsaError": "recsys_ksa.errors",
}
__all__ = ["OutOfOrderError", "Recommender", "RecsysKsaError", "UserState"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
