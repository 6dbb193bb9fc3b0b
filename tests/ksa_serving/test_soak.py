"""A service under steady load: memory, open files and threads stay where they were, and no state is wrong."""

import os
import re
import threading
import time
from pathlib import Path

import httpx
import pytest

from ksa_serving.client import Client
from ksa_serving.messages import EventMessage

pytestmark = pytest.mark.service
SECONDS = float(os.environ.get("KSA_SOAK_SECONDS", "30"))
"""120 with `make nightly`, 1,200 with FULL=1."""
NUM_USERS = 40
WARM = 300
"""Calls of each sender, of every kind, after which the service has met all that it keeps."""
FEW_MB = 30
"""More than this between the first third and the end is a leak; the toy's states themselves are bounded."""


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def counts(pid: int) -> tuple[int, int]:
    """Open files and threads."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_a_service_under_steady_load_grows_in_nothing(tmp_path: Path):
    import subprocess
    import sys

    command = [sys.executable, str(Path(__file__).parent / "toy_server.py"), str(tmp_path), "0", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().split()[1]
    begin, faults, done = time.monotonic(), [], [0, 0, 0]

    def user(number: int) -> None:
        with Client(url) as client:
            n = 0
            while time.monotonic() - begin < SECONDS or n < 3 * WARM:
                name = f"u{n % NUM_USERS}-{number}"
                # Users are forgotten before they grow: what is kept is bounded, so that what grows is a leak.
                if n % 2000 >= 1960 or n == WARM // 2:
                    client.forget(name)
                else:
                    client.keep(name, [EventMessage(f"item-{n % 30}", 1000 + n, f"e{n}")])
                    if client.recommend(name, k=3).degraded:
                        faults.append("degraded")
                if n % 500 == 0:
                    client.explain(name, "item-1")
                n += 1
                done[number] = n

    threads = [threading.Thread(target=user, args=(number,)) for number in range(3)]
    try:
        for thread in threads:
            thread.start()
        while time.monotonic() - begin < SECONDS / 3 or min(done) < WARM:
            assert all(thread.is_alive() for thread in threads)
            time.sleep(0.1)
        early, early_counts = resident_mb(process.pid), counts(process.pid)
        for thread in threads:
            thread.join()
        text = httpx.get(f"{url}/metrics").text
        late, late_counts = resident_mb(process.pid), counts(process.pid)
        print(f"{early:.0f} MB, then {late:.0f} MB; files and threads {early_counts}, then {late_counts}")
        assert late - early < FEW_MB
        assert late_counts[0] <= early_counts[0] + 10
        assert late_counts[1] <= early_counts[1] + 2
        assert not faults
        assert 'status="500"' not in text
        assert not re.findall(r'cause="(?:mismatch|damaged)"} (?!0\.0$).*', text, re.MULTILINE)
    finally:
        process.terminate()
        assert process.wait(timeout=120) == 0
        process.stdout.close()
