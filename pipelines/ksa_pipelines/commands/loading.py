"""Loading what works on buckets, quickly: of an increment at ten million events it is a third of the time."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Import inside of this what a verb works with.

    A worker a core calls Polars, so Polars gets half the cores: on two cores `prepare` of 10 million events took 17.8 s
    of processor time so, and 21.6 s with Polars on both (commit 3d73e89). What is loaded is never garbage: looking for
    it costs a tenth of the loading, and something each time later.
    """
    os.environ.setdefault("POLARS_MAX_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    gc.disable()
    try:
        yield
        _keep_arrow_from_loading_pandas()
    finally:
        gc.freeze()
        gc.enable()


class _NoPandas:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def _keep_arrow_from_loading_pandas() -> None:
    """Have Arrow look for pandas now, without finding it.

    It looks once, at its first array, and loads a pandas that is installed: half a second and 60 MB for nothing.
    """
    import pyarrow as pa

    sys.meta_path.insert(0, _NoPandas)
    try:
        pa.array([0]).to_numpy()
    finally:
        sys.meta_path.remove(_NoPandas)
