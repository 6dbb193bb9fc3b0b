"""kill -9 at random instants: no acknowledged event is lost, none is applied twice, states equal the log again."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
import log_under_load
import pytest
from zygote import Child, Zygote

from ksa_serving.event_log import EventLog
from ksa_serving.events import Owner
from ksa_serving.service import Service
from ksa_serving.testing import ToyModel

pytestmark = pytest.mark.service
NUM_KILLS = int(os.environ.get("KSA_KILLS", "100"))
NUM_AT_A_POINT = int(os.environ.get("KSA_KILLS_AT_A_POINT", "2"))
"""100 with `make nightly FULL=1`."""
POINTS = (
    "ksa_serving.log_entries:LogEntries.look_up/before",  # a transaction was begun
    "ksa_serving.log_entries:LogEntries.save/after",  # written, not committed
    "ksa_serving.service:Service._on_commit/before",  # committed, not acknowledged
    "ksa_serving.lmdb_engine:LmdbEngine.write/before",
    "ksa_serving.lmdb_engine:LmdbEngine.write/after",
    "ksa_serving.log_entries:LogEntries.forget/after",
    "ksa_serving.log_entries:LogEntries.purge/after",
    "ksa_serving.lmdb_engine:LmdbEngine.remove/before",
    "ksa_serving.lmdb_engine:LmdbEngine.remove/after",
    "os:replace/before",  # the cold store was copied without what was deleted
    "os:replace/after",
)
NUM_SERVICE_KILLS = NUM_KILLS // 10


@pytest.fixture(scope="module")
def loads() -> Iterator[Zygote]:
    """Begins processes that keep events until they are killed."""
    zygote = Zygote("log_under_load", "lmdb", "ksa_serving.lmdb_engine", "ksa_serving.tiered_store")
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def services() -> Iterator[Zygote]:
    """Begins whole services."""
    zygote = Zygote(
        "recsys_ksa.cli", "ksa_serving.app", "ksa_serving.server", "ksa_serving.library_model", "pyarrow.dataset"
    )
    yield zygote
    zygote.close()


def whole_lines(stream: IO[str]) -> list[str]:
    """Return all lines; the last may have been cut by the kill and then acknowledged nothing."""
    return [line for line in stream.read().splitlines(keepends=True) if line.endswith("\n")]


def test_kill_at_random_instants_loses_and_doubles_nothing(loads: Zygote, tmp_path: Path, seed: int):
    draw = random.Random(seed)
    acknowledged: dict[str, set[int]] = {}
    for turn in range(NUM_KILLS):
        child = loads.spawn("log_under_load:run", str(tmp_path), str(turn))
        told = [child.stdout.readline() for _ in range(draw.randint(1, 30))]  # "ready", and what was acknowledged
        time.sleep(draw.uniform(0.0, 0.1))
        child.send_signal(signal.SIGKILL)
        read_and_check(child, told, tmp_path, acknowledged)
    assert sum(map(len, acknowledged.values())) > 10 * NUM_KILLS


def test_kill_at_named_points_loses_and_doubles_nothing(loads: Zygote, tmp_path: Path, seed: int):
    draw = random.Random(seed)
    acknowledged: dict[str, set[int]] = {}
    for turn, point in enumerate(POINTS * NUM_AT_A_POINT):
        nth = draw.randint(1, 4 if point.startswith("os") else 20)
        child = loads.spawn("log_under_load:run", str(tmp_path), str(turn), f"{point}/{nth}")
        too_late = threading.Timer(300, child.send_signal, [signal.SIGTERM])
        too_late.start()
        told = whole_lines(child.stdout)  # while it lives: one that lives long would wait for its reader
        too_late.cancel()
        assert child.wait() == -signal.SIGKILL, f"{point} was never reached"
        read_and_check(child, told, tmp_path, acknowledged)


def test_a_point_whose_call_fails_is_reached_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *given: killed.append(given))
    monkeypatch.setattr(os, "rmdir", os.rmdir)  # as it was, when this is undone
    log_under_load.arm("os:rmdir/after/1")
    with pytest.raises(FileNotFoundError):
        os.rmdir(tmp_path / "none")
    assert killed == []
    (tmp_path / "one").mkdir()
    os.rmdir(tmp_path / "one")
    assert killed == [(os.getpid(), signal.SIGKILL)]


def read_and_check(child: Child, told: list[str], directory: Path, acknowledged: dict[str, set[int]]) -> None:
    """Read what a killed child acknowledged beyond the lines it `told`, and find all of it in the log."""
    forgotten: list[str] = []
    for line in [*told, *whole_lines(child.stdout)]:
        if line == "ready\n":
            continue
        user, outcomes = json.loads(line)
        if outcomes == "forgotten":
            forgotten.append(user)
            continue
        assert {status for _, status in outcomes} <= {"accepted", "late-applied", "late-queued", "duplicate"}
        acknowledged.setdefault(user, set()).update(number for number, _ in outcomes)
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    check_against_log(directory, acknowledged, forgotten)


def check_against_log(directory: Path, acknowledged: dict[str, set[int]], forgotten: list[str]) -> None:
    service = log_under_load.open_service(directory)
    log = service.log
    log.check()
    assert not set(forgotten) & {owner.user_id for owner in log.owners()}, "deleted and back"
    for user, numbers in acknowledged.items():
        head, events = log.read(Owner(user))
        kept = Counter(event.item_id for event in events)
        assert not {f"item-{number}" for number in numbers} - kept.keys(), "acknowledged and lost"
        assert set(kept.values()) <= {1}, "applied twice"
        assert head.num_events == len(events)
        check_state(service, user)
    while log.purging:
        time.sleep(0.005)
    assert service.store.purge()
    service.store.close()
    log.close()
    for file in directory.iterdir():
        content = file.read_bytes()
        assert not [user for user in forgotten if f"{user}-item-".encode() in content], f"deleted, and in {file.name}"


def check_state(service: Service, user: str) -> None:
    """The state that memory, the cold store or the log leads to is that of the log's events."""
    record, _ = service.served.states.current(Owner(user))
    events = sorted(service.log.read(Owner(user))[1], key=lambda event: (event.timestamp, event.seq))
    toy = ToyModel("arrival")
    assert record.state == toy.append(toy.new_state(), events)


def start_service(run: Path, state_dir: Path) -> tuple[subprocess.Popen[str], str]:
    code = "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(run), "--port", "0", "--state-dir", str(state_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ready: http://127.0.0.1:"), line
    return process, line.split()[1]


def test_kill_of_the_whole_service(services: Zygote, tiny_run: Path, tmp_path: Path, seed: int):
    draw = random.Random(seed)
    acknowledged: list[dict[str, object]] = []
    sent: list[dict[str, object]] = []
    for _ in range(NUM_SERVICE_KILLS):
        process = services.spawn(
            "recsys_ksa.cli:main", ["serve", str(tiny_run), "--port", "0", "--state-dir", str(tmp_path)]
        )
        url = process.stdout.readline().split()[1]
        killer = threading.Timer(draw.uniform(0.5, 1.0), process.send_signal, [signal.SIGKILL])
        with httpx.Client(base_url=url, timeout=120) as client, contextlib.suppress(httpx.TransportError):
            assert set(post(client, sent[-9:])) <= {"accepted", "duplicate"}  # what a sender does after a crash
            acknowledged = list(sent)
            killer.start()
            while True:
                number = len(sent)
                events = [{"item_id": f"i{n % 40}", "timestamp": 1_600_000_000 + n} for n in range(number, number + 3)]
                sent += events
                assert post(client, events) == ["accepted"] * 3
                acknowledged += events
                client.post("/v1/users/ann/recommend", json={"k": 3}).raise_for_status()
        killer.join()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    log = EventLog(tmp_path, "arrival")
    kept = [(event.item_id, event.timestamp) for event in log.read(Owner("ann"))[1]]
    log.close()
    expected = [(event["item_id"], event["timestamp"]) for event in sent]
    assert kept in (expected[: len(acknowledged)], expected)  # the call under way: whole or not at all
    assert len(acknowledged) > 3


def post(client: httpx.Client, events: list[dict[str, object]]) -> list[str]:
    answer = client.post("/v1/users/ann/events", json={"events": events}).raise_for_status().json()
    return [result["status"] for result in answer["results"]]


def test_sigterm_ends_in_order_with_exit_code_0(tiny_run: Path, tmp_path: Path):
    process, url = start_service(tiny_run, tmp_path)
    with httpx.Client(base_url=url, timeout=120) as client:
        assert post(client, [{"item_id": "i1", "timestamp": 1_600_000_000}]) == ["accepted"]
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    assert process.stdout is not None
    process.stdout.close()
    assert not (tmp_path / "events.sqlite-wal").exists()  # closed in order, nothing left to recover
