"""The log's disk fails under a running service: events are refused with the reason, never acknowledged in silence.

Questions are answered from what is known; once the disk works, so does the service, without a restart; and when the
power goes after all that, every acknowledged event is there. The disk is simulated (`faulty_disk.py`), all else real.
"""

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from faulty_disk import FAULTS, Disk, Fault, FaultyVfs, faulty_disks

from ksa_serving.errors import EventLogError
from ksa_serving.event_log import EventLog
from ksa_serving.events import NewEvent, Owner
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.service import Service
from ksa_serving.testing import toy_release

pytestmark = pytest.mark.service
NOW = 1_700_000_000
PATIENCE = 120
"""Seconds after which a service that should have recovered has not."""
ASKED = {"k": 3, "request_time": None}
RESTING: tuple[Fault, ...] = ("write-error", "sync-error", "full", "read-only")
"""Faults that leave what is written readable."""


@pytest.fixture
def vfs() -> Iterator[FaultyVfs]:
    with faulty_disks() as vfs:
        yield vfs


class Sender:
    """Sends events of one user, each with a number, and knows which were acknowledged."""

    def __init__(self, client: httpx.Client):
        self.client = client
        self.sent = 0
        self.acknowledged: set[int] = set()

    def post(self, number: int | None = None) -> httpx.Response:
        if number is None:
            number, self.sent = self.sent, self.sent + 1
        event = {"item_id": "x" * 200, "timestamp": number, "event_id": f"e{number}"}
        response = self.client.post("/v1/users/ann/events", json={"events": [event]})
        if response.status_code == 200:
            assert response.json()["results"][0]["status"] in ("accepted", "duplicate", "late-applied")
            self.acknowledged.add(number)
        return response

    def ask(self) -> dict[str, Any]:
        response = self.client.post("/v1/users/ann/recommend", json=ASKED)
        assert response.status_code == 200, response.text
        return response.json()


def until(true: Callable[[], bool]) -> float:
    """Return how many seconds it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.02)
    return time.monotonic() - began


def refused(response: httpx.Response) -> bool:
    """Whether an event was refused, and then as it should be."""
    if response.status_code == 200:
        return False
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "event-log-unavailable"
    assert "Nothing of this call was kept" in response.json()["detail"]
    return True


@contextlib.contextmanager
def service_on(disk: Disk, serve: Any) -> Iterator[Sender]:
    log = EventLog(disk.folder, "arrival")
    log._connection.wal_autocheckpoint(20)
    with serve(Service(toy_release(), log, MemoryStateStore(10**7), clock=lambda: NOW)) as client:
        yield Sender(client)


def new_disk(vfs: FaultyVfs, folder: Path, seed: int) -> Disk:
    folder.mkdir()
    return vfs.mount(Disk(folder, random.Random(seed)))


@pytest.mark.parametrize("fault", FAULTS)
def test_events_are_refused_while_the_disk_fails_and_taken_once_it_works(
    vfs: FaultyVfs, tmp_path: Path, seed: int, serve_in_thread: Any, fault: Fault
):
    disk = new_disk(vfs, tmp_path / "log", seed)
    with service_on(disk, serve_in_thread) as sender:
        for _ in range(2):
            for _ in range(30):
                assert sender.post().status_code == 200
            before = sender.ask()
            disk.fault = fault
            until(lambda: refused(sender.post()))  # a full disk has room in files that are there
            if fault in RESTING:
                kept = len(sender.acknowledged)
                assert sender.ask()["num_events"] >= kept >= before["num_events"]
                assert sender.client.get("/v1/users/ann/events").status_code == 200
                assert sender.client.post("/v1/users/nobody/recommend", json=ASKED).json()["num_events"] == 0
                ready = sender.client.get("/readyz")
                assert (ready.status_code, ready.json()["reason"]) == (503, "event log cannot be written")
            assert sender.client.get("/livez").status_code == 200
            if not refused(again := sender.post(0)):  # what is known needs no writing
                assert again.json()["results"][0]["status"] == "duplicate"
            disk.fault = None
            took = until(lambda: sender.client.get("/readyz").status_code == 200)
            assert sender.post().status_code == 200
            print(f"{fault}: ready {1000 * took:.0f} ms after the disk was")
            for number in set(range(sender.sent)) - sender.acknowledged:  # senders try again
                assert sender.post(number).status_code == 200
            assert sender.ask()["num_events"] == sender.sent
    assert_kept(vfs, disk, tmp_path / "later", sender)


def assert_kept(vfs: FaultyVfs, disk: Disk, folder: Path, sender: Sender) -> None:
    """Cut the power; find all that was acknowledged, once."""
    log = EventLog(vfs.mount(disk.cut_power(folder)).folder, "arrival")
    log.check()
    kept = Counter(int(event.timestamp) for event in log.read(Owner("ann"))[1])
    log.close()
    assert set(kept.values()) == {1}
    assert sender.acknowledged <= kept.keys() <= set(range(sender.sent))


def test_a_log_that_cannot_be_opened_for_reading_is_told_as_one_that_cannot_be_read(
    vfs: FaultyVfs, tmp_path: Path, seed: int
):
    disk = new_disk(vfs, tmp_path / "log", seed)
    log = EventLog(disk.folder, "arrival")
    disk.off = True
    with pytest.raises(EventLogError, match="cannot be read"):
        log.head(Owner("ann"))
    disk.off = False
    assert log.head(Owner("ann")).num_events == 0
    log.close()


def test_the_writer_outlives_a_disk_that_fails_in_every_way(vfs: FaultyVfs, tmp_path: Path, seed: int):
    disk = new_disk(vfs, tmp_path / "log", seed)
    log = EventLog(disk.folder, "arrival")
    log._connection.wal_autocheckpoint(2)
    for number in range(5):
        log.append(Owner("ann"), [NewEvent("milk", number)])
        log._connection.pragma("shrink_memory")  # nothing is known without the disk
        disk.off = True
        futures = [log.submit(Owner(user), [NewEvent("bread", number)]) for user in ("bob", "eve")]
        for future in futures:
            with pytest.raises(EventLogError):
                future.result(PATIENCE)
        disk.off = False
    assert log.submit(Owner("ann"), [NewEvent("milk", 9)]).result(PATIENCE).outcomes == ["accepted"]
    log.close()


def test_events_wait_for_a_slow_disk_and_questions_do_not(
    vfs: FaultyVfs, tmp_path: Path, seed: int, serve_in_thread: Any
):
    disk = new_disk(vfs, tmp_path / "log", seed)
    with service_on(disk, serve_in_thread) as sender:
        for _ in range(5):
            sender.post()
        sender.ask()
        order: list[str] = []
        disk.goes_on.clear()
        sending = threading.Thread(target=lambda: order.append(f"events {sender.post().status_code}"))
        sending.start()
        try:
            until(lambda: disk.syncing)
            for _ in range(3):
                assert sender.ask()["num_events"] == 5
                order.append("answer")
            assert sender.client.get("/readyz").status_code == 200
        finally:
            disk.goes_on.set()
        sending.join()
        assert order == ["answer", "answer", "answer", "events 200"]
        assert sender.ask()["num_events"] == 6
    assert_kept(vfs, disk, tmp_path / "later", sender)


def test_senders_at_once_are_told_the_truth_while_the_disk_fails_now_and_then(
    vfs: FaultyVfs, tmp_path: Path, seed: int, serve_in_thread: Any
):
    disk = new_disk(vfs, tmp_path / "log", seed)
    with service_on(disk, serve_in_thread) as sender:
        numbers = itertools.count()
        sender.sent = 160
        stop = threading.Event()

        def send() -> None:
            while (number := next(numbers)) < sender.sent:
                until(partial(lambda number: sender.post(number).status_code == 200, number))

        def fail_now_and_then() -> None:
            until(lambda: disk.faults > 0)  # the first is met for certain
            while not stop.is_set():
                disk.fault = draw.choice([None, *RESTING])
                time.sleep(draw.random() * 0.03)
            disk.fault = None

        draw = random.Random(seed)
        disk.fault = draw.choice(RESTING)
        threads = [threading.Thread(target=send) for _ in range(4)]
        failing = threading.Thread(target=fail_now_and_then)
        for thread in (*threads, failing):
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        failing.join()
        assert disk.faults > 0
        until(lambda: sender.client.get("/readyz").status_code == 200)
        assert sender.ask()["num_events"] == sender.sent == len(sender.acknowledged)
    assert_kept(vfs, disk, tmp_path / "later", sender)
