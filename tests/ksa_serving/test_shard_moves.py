"""A move over HTTP, ended at every step in turn and gone on with: nothing is lost, doubled, or written by two."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ksa_serving.app import create_app
from ksa_serving.client import user_path
from ksa_serving.command import listen
from ksa_serving.errors import ShardError
from ksa_serving.event_log import EventLog
from ksa_serving.events import Owner
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.server import ReadyServer, server_config
from ksa_serving.service import Service
from ksa_serving.shard_mover import MapFiles, Mover
from ksa_serving.shard_rows import Page
from ksa_serving.shards import NUM_VIRTUAL_SHARDS, Ownership, Process, ShardMap, next_map, virtual_shard
from ksa_serving.testing import toy_release

pytestmark = pytest.mark.service
HTTP = httpx.Client(timeout=120)


@pytest.fixture(autouse=True, scope="module")
def _http():
    with HTTP:
        yield


USERS = [f"u/{n}" for n in range(4)]


class Killed(BaseException):
    """The mover ends here."""


class MortalMover(Mover):
    """Ends after so many steps that anyone could notice."""

    def __init__(self, files: MapFiles, last: float = float("inf")):
        super().__init__(files, HTTP, lambda: None, patience=0)
        self._last, self._done = last, 0
        for part, name in ((files, "begin"), (files, "hold"), (files, "tell_proxy"), (self, "_reload")):
            setattr(part, name, self._mortal(getattr(part, name)))

    def _call(self, *given: Any) -> Any:
        return self._mortal(super()._call)(*given)

    def _mortal(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*given: Any) -> Any:
            self._done += 1
            if self._done > self._last:
                raise Killed
            return step(*given)

        return dying


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[dict[str, tuple[Service, Process]]]:
    """Two services in threads, each with a listener for its operator."""
    made: dict[str, tuple[Service, Process]] = {}
    with contextlib.ExitStack() as stack:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            service = Service(toy_release(), EventLog(tmp_path / name, "arrival"), MemoryStateStore(10**7))
            listeners = [stack.enter_context(listen("127.0.0.1", 0)) for _ in range(2)]
            ports = [listener.getsockname()[1] for listener in listeners]
            app = create_app(service, admin_port=ports[1])
            server = ReadyServer(server_config(app, service), service, "ready")
            thread = threading.Thread(target=server.run, kwargs={"sockets": listeners})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            while not server.started:
                time.sleep(0.01)
            made[name] = (service, Process(f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"))
        yield made


def post(process: Process, user: str, number: int, **headers: str) -> httpx.Response:
    events = [{"item_id": f"item-{number % 50}", "timestamp": 1000 + number, "event_id": f"e{number}"}]
    url = f"http://{process.address}{user_path(user, 'events')}"
    return HTTP.post(url, json={"events": events}, headers=headers)


def test_a_move_that_dies_at_any_step_is_gone_on_with_and_loses_nothing(pair: Any, tmp_path: Path):
    """Everyone moves from one process to the other and back, the mover killed one step later each time."""
    services = {name: service for name, (service, _) in pair.items()}
    processes = {name: process for name, (_, process) in pair.items()}
    numbers = itertools.count()
    kept: dict[str, list[str]] = {user: [] for user in USERS}
    file = tmp_path / "shards.json"
    MortalMover(MapFiles(file)).move(processes)
    MortalMover(MapFiles(file)).move({"a": processes["a"]})
    killed = True
    last = 0
    for last in itertools.count(1):
        if not killed:
            break
        new = "ab"[last % 2]
        old = "ba"[last % 2]
        try:
            killed = False
            MortalMover(MapFiles(file), last).move({new: processes[new]}, most=NUM_VIRTUAL_SHARDS)
        except Killed:
            killed = True
        for user in USERS[last % 2 :: 2]:  # whatever state it died in, at most one of them takes a write
            number = next(numbers)
            statuses = [post(processes[name], user, number).status_code for name in (old, new)]
            assert sorted(statuses) in ([200, 503], [503, 503]), (last, statuses)
            if 200 in statuses:
                kept[user].append(f"e{number}")
        MortalMover(MapFiles(file)).move({new: processes[new]}, most=NUM_VIRTUAL_SHARDS)
        assert services[old].log.owners() == []
        for user in USERS:
            number = next(numbers)
            assert post(processes[old], user, number).json()["code"] == "user-elsewhere"
            assert post(processes[new], user, number).json()["results"] == [{"status": "accepted", "reason": None}]
            kept[user].append(f"e{number}")
        read = {
            owner.user_id: [event.event_id for event in services[new].log.read(owner)[1]]
            for owner in services[new].log.owners()
        }
        assert read == kept, last
        assert not file.with_suffix(".next.json").exists()
    assert last > 15, "steps that could be noticed"


def test_states_follow_their_users_and_numbers_only_rise(pair: Any, tmp_path: Path):
    (a, at_a), (_, at_b) = pair["a"], pair["b"]
    files = MapFiles(tmp_path / "shards.json")
    for number in range(40):
        post(at_a, "ann", number)
    asked = {"k": 5, "request_time": None}
    before = HTTP.post(f"http://{at_a.address}/v1/users/ann/recommend", json=asked).json()
    for number in range(30):
        post(at_b, "bob", number)  # b has numbers of its own
    with pytest.raises(ShardError, match="one process with users"):
        Mover(files, HTTP, lambda: None).move({"a": at_a, "b": at_b})
    HTTP.delete(f"http://{at_b.address}/v1/users/bob").raise_for_status()
    Mover(files, HTTP, lambda: None).move({"a": at_a, "b": at_b})
    Mover(files, HTTP, lambda: None).move({"b": at_b})
    refused = HTTP.post(f"http://{at_a.address}/v1/users/ann/recommend", json=asked)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["code"] == "user-elsewhere"
    after = HTTP.post(f"http://{at_b.address}/v1/users/ann/recommend", json={**asked, "min_seq": before["seq"]}).json()
    assert (after["items"], after["num_events"], after["stale"]) == (before["items"], before["num_events"], False)
    assert after["seq"] > before["seq"]
    assert len(a.store) == 0
    old_epoch = post(at_b, "ann", 99, **{"x-ksa-shard": str(virtual_shard("ann")), "x-ksa-epoch": "1"})
    assert (old_epoch.status_code, old_epoch.json()["code"]) == (503, "old-epoch")
    assert post(at_b, "ann", 99, **{"x-ksa-shard": "x", "x-ksa-epoch": "1"}).json()["code"] == "invalid-edge"
    assert post(at_b, "ann", 99, **{"x-ksa-epoch": "1"}).json()["code"] == "invalid-edge"
    assert b'ksa_refused_total{code="user-elsewhere"} 1.0' in a.metrics.text()


def test_a_step_that_cannot_be_finished_is_undone(pair: Any, tmp_path: Path):
    (a, at_a), (b, at_b) = pair["a"], pair["b"]
    file = tmp_path / "shards.json"
    for user in USERS:
        post(at_a, user, 0)
    MortalMover(MapFiles(file)).move({"a": at_a})
    with pytest.raises(ShardError, match="got none"):
        Mover(MapFiles(file), HTTP, lambda: None).cancel()
    last = 0
    while not b.log.owners():  # until users were given over
        last += 1
        with contextlib.suppress(Killed):
            MortalMover(MapFiles(file), last).move({"b": at_b}, most=NUM_VIRTUAL_SHARDS)
    assert {post(at_a, user, 1).json()["code"] for user in USERS} == {"user-moving"}
    Mover(MapFiles(file), HTTP, lambda: None).cancel()
    assert {post(at_a, user, 1).json()["results"][0]["status"] for user in USERS} == {"accepted"}
    assert b.log.owners() == []
    Mover(MapFiles(file), HTTP, lambda: None).move({"b": at_b}, most=300)  # and done after all
    assert {b.log.head(owner).num_events for owner in b.log.owners()} == {2}
    assert len(b.log.owners()) == len(USERS)
    assert a.log.owners() == []


class LossyMover(Mover):
    """Drops the last entry of each page."""

    def _pages(self, source: Process, target: str) -> Iterator[Page]:
        for page in super()._pages(source, target):
            for user in page.users[-1:]:
                user.entries.pop()
            yield page


def test_users_who_did_not_arrive_whole_are_not_let_go(pair: Any, tmp_path: Path):
    (a, at_a), (b, at_b) = pair["a"], pair["b"]
    files = MapFiles(tmp_path / "shards.json")
    for user in USERS:
        post(at_a, user, 0)
        post(at_a, user, 1)
    Mover(files, HTTP, lambda: None).move({"a": at_a})
    with pytest.raises(ShardError, match=r"expected what the old owner has \(Tally\(users=4, entries=8, .* got .*=7"):
        LossyMover(files, HTTP, lambda: None).move({"b": at_b}, most=NUM_VIRTUAL_SHARDS)
    assert len(a.log.owners()) == len(USERS)
    Mover(files, HTTP, lambda: None).move({"b": at_b}, most=NUM_VIRTUAL_SHARDS)  # sent again whole
    assert {b.log.head(owner).num_events for owner in b.log.owners()} == {2}
    assert a.log.owners() == []


def test_a_process_refuses_maps_that_do_not_follow_its_own(pair: Any, tmp_path: Path):
    (_, at_a), (_, at_b) = pair["a"], pair["b"]
    file = tmp_path / "shards.json"
    held = Mover(MapFiles(file), HTTP, lambda: None).move({"a": at_a, "b": at_b})

    def own(ownership: Ownership) -> str:
        response = Mover(MapFiles(file), HTTP, lambda: None, patience=0)
        try:
            response._own(at_a, ownership)
        except ShardError as error:
            return str(error)
        return "ok"

    coming = next_map(held, {"b": at_b})
    other = next_map(held, {"b": at_b})
    assert coming is not None
    assert other is not None
    assert "expected a's" in own(Ownership("b", held))
    older = ShardMap(0, "m", held.processes, held.owners, held.since)
    assert f"follows epoch {held.epoch}" in own(Ownership("a", older))
    assert f"next, got {held.epoch}" in own(Ownership("a", held, held))
    assert own(Ownership("a", held, coming)) == "ok"
    assert own(Ownership("a", held, coming)) == "ok"
    assert "follows" in own(Ownership("a", held, other))  # one move at a time
    assert "follows" in own(Ownership("a", other))
    assert own(Ownership("a", held)) == "ok"
    page = HTTP.post(f"http://{at_a.admin}/admin/shards/export", json={"target": "b"})
    assert (page.status_code, page.json()["code"]) == (409, "move-refused")
    assert HTTP.post(f"http://{at_a.admin}/admin/shards/import", content=b"\x00").status_code == 400
    assert HTTP.get(f"http://{at_a.address}/admin/shards").status_code == 404  # on the operator's listener alone


def test_the_first_map_gives_all_to_one_who_keeps_what_is_sent_while_it_is_made(pair: Any, tmp_path: Path):
    (service, at_a), (_, at_b) = pair["a"], pair["b"]
    mover = Mover(MapFiles(tmp_path / "shards.json"), HTTP, lambda: None)
    owned = mover._owned

    def sent_after_they_were_counted(process: Process) -> Any:
        answer = owned(process)
        for number, user in enumerate(USERS):
            if service.log.ownership is None:
                assert post(at_a, user, number).status_code == 200
        return answer

    mover._owned = sent_after_they_were_counted
    held = mover.move({"a": at_a, "b": at_b})
    for user in USERS:
        owner = pair[held.owners[virtual_shard(user)]][0]
        assert len(owner.log.read(Owner(user))[1]) == 1


def test_a_process_that_is_away_ends_a_move_with_its_address(tmp_path: Path):
    nowhere = Process("127.0.0.1:1", "127.0.0.1:1")
    with pytest.raises(ShardError, match=r"127\.0\.0\.1:1/admin/shards: expected an answer"):
        Mover(MapFiles(tmp_path / "shards.json"), HTTP, lambda: None, patience=0).move({"a": nowhere})


def test_a_map_that_was_cut_is_refused(tmp_path: Path):
    (tmp_path / "shards.json").write_text('{"epoch": 1')
    with pytest.raises(ShardError, match="expected a shard map"):
        MapFiles(tmp_path / "shards.json").held()
