"""The same work as tasks on a Ray cluster (extra `ray`).

Tasks hand over file names: the log, and the folder that is worked in (beside the data set), must be seen by all
machines under the same path. A task can run again: it writes the same files.
"""

import importlib
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ksa_pipelines.engine import Result, Task
from recsys_ksa.errors import DataError, MissingPackageError

RETRIES = 3
PATIENCE = 10
"""Seconds that a cluster has to answer."""


class RayEngine:
    """Tasks on Ray, one a core.

    Args:
        address: `host:port` of a running cluster; None starts Ray on this machine, and stops it with the process.

    Raises:
        MissingPackageError: Ray is not installed.
        DataError: there is no cluster at the address.
    """

    def __init__(self, address: str | None = None) -> None:
        # Asks Ray to leave accelerator variables alone, which it announces in a warning otherwise.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise MissingPackageError(
                "--engine ray: expected the package ray, which is not installed. Run `pip install recsys-ksa[ray]`."
            ) from error
        self._ray = ray
        if not ray.is_initialized():
            if address is not None:
                _refuse_unreachable(address)
            variables = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
            options = {"runtime_env": {"env_vars": variables}, "logging_level": "error", "log_to_driver": False}
            try:
                ray.init(address=address, include_dashboard=None if address else False, **options)
            except (ConnectionError, ValueError) as error:
                raise DataError(f"--ray-address {address}: expected a Ray cluster, got: {error}.") from error
        self.workers = self.processes = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield each task's result, in order of tasks; a killed worker's task runs again.

        Raises:
            DataError: a task's worker died again and again, as when its memory ran out.
        """

        def call(task: Task) -> Result:
            return function(task)

        remote = self._ray.remote(num_cpus=1, max_retries=RETRIES)(call)
        waiting = deque(remote.remote(task) for task in tasks)
        try:
            while waiting:
                yield self._ray.get(waiting.popleft())
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"ray: expected a worker to live, it died {RETRIES + 1} times: {reason}. Look at Ray's logs; give it "
                "more memory or the data set more buckets."
            ) from error
        finally:
            for each in waiting:  # after an error only: Ray falls over a task that is cancelled as it ends
                self._ray.cancel(each, force=False)


def _refuse_unreachable(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself would try for minutes.

    Raises:
        DataError: no connection is made within `PATIENCE`.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"--ray-address {address}: expected HOST:PORT of a Ray cluster, got: {error}. Start one with "
            "`ray start --head --port 6379`."
        ) from error
