"""A service as its operators start it: `ksa serve` in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

KSA = [sys.executable, "-c", "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


@contextlib.contextmanager
def served(*arguments: object, end: signal.Signals = signal.SIGTERM) -> Iterator[list[str]]:
    """Run `ksa serve` on a free port; yield its address, and the operators' where it has one; end it by a signal."""
    command = [*KSA, "serve", *map(str, arguments), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    try:
        yield _addresses(server)
    finally:
        server.send_signal(end)
        server.communicate(timeout=300)


def _addresses(server: subprocess.Popen[str]) -> list[str]:
    """Wait for the line that says where the service listens."""
    assert server.stdout is not None
    deadline = time.monotonic() + 300
    said = []
    while time.monotonic() < deadline:
        line = server.stdout.readline()
        if not line and server.poll() is not None:
            break
        said.append(line)
        if found := [word for word in line.split() if word.startswith("http://127.0.0.1:")]:
            return found
    raise AssertionError("the service did not say where it listens: " + "".join(said))
