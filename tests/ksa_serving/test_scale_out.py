"""Processes behind a real HAProxy that finds each user's by the shard map, while they are killed, added and removed."""

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from held_port import held_port
from test_app import assert_problem

from ksa_serving.client import Client, user_path
from ksa_serving.errors import ClientError
from ksa_serving.event_log import EventLog
from ksa_serving.messages import EventMessage
from ksa_serving.problems import no_room
from ksa_serving.settings import ServeSettings
from ksa_serving.shard_mover import MapFiles, Mover
from ksa_serving.shards import Process, virtual_shard
from recsys_ksa.cli import call_verb

pytestmark = pytest.mark.service
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
CONFIG = Path(__file__).parents[2] / "serving" / "haproxy.cfg"
NUM_MOVES = int(os.environ.get("KSA_MOVES", "2"))
"""Processes added or removed under load; more with `make nightly`."""
PATIENCE = 120
"""Seconds after which what should happen soon has not."""
NAMES = ("shard-1", "shard-2", "shard-3", "shard-4")


class Cluster:
    """Four processes of the toy model and the proxy before them; users are on the first three.

    Args:
        ports: two for each process, one for the proxy and one for its metrics.
    """

    def __init__(self, folder: Path, ports: Iterator[int]):
        self.folder = folder
        self.ports = {name: (next(ports), next(ports)) for name in NAMES}
        self.processes = {name: Process(*(f"127.0.0.1:{port}" for port in ports)) for name, ports in self.ports.items()}
        self.shards: dict[str, Any] = {}
        self.files = MapFiles(folder / "shards.json")
        self.port, self.metrics_port = next(ports), next(ports)
        self.url = f"http://127.0.0.1:{self.port}"
        self.proxy: Any = None

    def begin(self) -> None:
        folder = self.folder
        for name in NAMES:
            self.shards[name] = self.spawn(name)
        for name in NAMES:
            assert self.shards[name].stdout.readline().startswith("ready")
        self.move(NAMES[:3], "true")
        text = CONFIG.read_text().replace(":8000", f":{self.port}").replace(":8404", f":{self.metrics_port}")
        (folder / "haproxy.cfg").write_text(text)
        command = [HAPROXY or "", "-f", str(folder / "haproxy.cfg"), "-f", str(folder / "shards.cfg")]
        subprocess.run([*command, "-c", "-q"], check=True)
        self.proxy = subprocess.Popen([*command, "-W", "-db"], stderr=subprocess.DEVNULL)
        self.wait()

    def proxys_503s(self) -> Counter[str]:
        """How many requests HAProxy itself answered with an error of the server, by backend."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        found = re.findall(r'haproxy_(backend|server)_http_responses_total{proxy="([^"]*)".*code="5xx"} (\d+)', text)
        counts = Counter[str]()
        for side, where, count in found:
            counts[where] += int(count) if side == "backend" else -int(count)
        return counts

    def spawn(self, name: str) -> Any:
        command = [sys.executable, str(Path(__file__).parent / "toy_server.py"), str(self.folder / name)]
        return subprocess.Popen([*command, *map(str, self.ports[name])], stdout=subprocess.PIPE, text=True)

    def restart(self, name: str) -> None:
        self.shards[name].stdout.close()
        self.shards[name] = self.spawn(name)
        assert self.shards[name].stdout.readline().startswith("ready")

    def move(self, names: tuple[str, ...], reload: str) -> None:
        """Have the command give users to these processes."""
        tables = (
            f'[{n}]\naddress = "{p.address}"\nadmin = "{p.admin}"\n' for n, p in self.processes.items() if n in names
        )
        (self.folder / "processes.toml").write_text("".join(tables))
        files = [str(self.folder / "shards.json"), "--processes", str(self.folder / "processes.toml")]
        call_verb("shards", ["move", *files, "--reload", reload])

    def reload(self) -> None:
        self.proxy.send_signal(signal.SIGUSR2)

    def kill(self, name: str) -> None:
        self.shards[name].send_signal(signal.SIGKILL)
        self.shards[name].wait()
        self.restart(name)

    def pause(self, name: str, seconds: float = 0.5) -> None:
        """Have a process neither answer nor die, and then go on as if nothing had been."""
        process = self.shards[name]
        process.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, process.send_signal, [signal.SIGCONT]).start()

    def wait(self) -> None:
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        raise AssertionError("the proxy does not answer")

    def stop(self) -> None:
        for process in filter(None, [self.proxy, *self.shards.values()]):
            process.terminate()
            process.wait()
        for shard in self.shards.values():
            shard.stdout.close()
        self.proxy, self.shards = None, {}

    def kept(self) -> dict[str, Counter[str]]:
        """Return the event ids of everyone, once all is stopped; each user is on one log, that of the map."""
        held = self.files.held()
        assert held is not None
        kept: dict[str, Counter[str]] = {}
        for name in NAMES:
            log = EventLog(self.folder / name, "arrival")
            for owner in log.owners():
                assert owner.user_id not in kept, "one user on two logs"
                assert held.owners[virtual_shard(owner.user_id)] == name
                kept[owner.user_id] = Counter(event.event_id or "" for event in log.read(owner)[1])
            log.close()
        return kept


@pytest.fixture(scope="module")
def made_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if HAPROXY is None:
        pytest.skip("haproxy is not installed; packaging/system.sh installs it")
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(held_port()) for _ in range(2 * len(NAMES) + 2)]
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), iter(ports))
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def cluster(made_cluster: Cluster) -> Cluster:
    """One that runs, whichever test came before, in whatever order workers take them."""
    if made_cluster.proxy is None:
        made_cluster.begin()
    return made_cluster


class Sender(threading.Thread):
    """Sends its own users' events through the proxy, a third of them again, until told to stop."""

    def __init__(self, url: str, number: int, seed: int):
        super().__init__()
        self.acknowledged: dict[str, set[str]] = {f"sender {number}/user-{n}": set() for n in range(12)}
        self.stopping = False
        self.failure: Exception | None = None
        self._url = url
        self._draw = random.Random(seed + number)

    def run(self) -> None:
        with Client(self._url, timeout=5, tries=1) as client:
            number = 0
            while not self.stopping and self.failure is None:
                try:
                    self.send(client, number)
                except Exception as error:  # the test tells it
                    self.failure = error
                number += 1

    def send(self, client: Client, number: int) -> None:
        user = self._draw.choice(list(self.acknowledged))
        known = self.acknowledged[user]
        ids = [f"e{number}", *self._draw.sample(sorted(known), min(len(known), self._draw.randrange(2)))]
        events = [EventMessage(f"item-{int(i[1:]) % 50}", 1000 + int(i[1:]), i) for i in ids]
        answer = self.until_answered(lambda: client.keep(user, events))
        for event_id, result in zip(ids, answer.results):
            assert result.status in ("accepted", "duplicate"), result
            assert result.status == "duplicate" or event_id not in known, "kept twice"
        known.update(ids)
        if number % 4 == 0:  # what was acknowledged is known to the next answer, wherever the user is now
            asked = self.until_answered(lambda: client.recommend(user, k=1, min_seq=answer.seq))
            assert asked.num_events == len(known)
            assert not asked.stale

    def until_answered(self, call: Any) -> Any:
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            with contextlib.suppress(ClientError):
                return call()
            time.sleep(0.02)
        return call()


def num_kept(senders: list[Sender]) -> int:
    """Return how many events were acknowledged."""
    return sum(len(ids) for sender in senders for ids in sender.acknowledged.values())


class Killed(BaseException):
    """The mover ends here."""


class UnluckyMover(Mover):
    """Before some of its calls a process is killed or stopped for a while, or the mover itself is killed."""

    def __init__(self, cluster: Cluster, http: httpx.Client, draw: random.Random, num_kills: int):
        super().__init__(cluster.files, http, cluster.reload, patience=PATIENCE)
        self._cluster, self._draw = cluster, draw
        self._kills = {draw.randrange(60): draw.choice([*NAMES, "mover", "pause"]) for _ in range(num_kills)}
        self._calls = 0

    def _call(self, *given: Any) -> Any:
        whom = self._kills.get(self._calls)
        self._calls += 1
        if whom == "mover":
            raise Killed
        if whom == "pause":
            self._cluster.pause(self._draw.choice(NAMES))
        elif whom is not None:
            self._cluster.kill(whom)
        return super()._call(*given)


def test_a_process_that_is_away_is_not_stood_in_for(cluster: Cluster):
    held = cluster.files.held()
    assert held is not None
    owners = {f"ü/{n}": held.owners[virtual_shard(f"ü/{n}")] for n in range(100)}
    users = [next(user for user, owner in owners.items() if owner == name) for name in NAMES[:3]]
    with Client(cluster.url, tries=1200) as client, httpx.Client(base_url=cluster.url, timeout=PATIENCE) as http:
        client._sleep = lambda seconds: time.sleep(0.1)
        for user in users:
            client.keep(user, [EventMessage("item-1", 1)])
        cluster.shards["shard-2"].terminate()
        assert cluster.shards["shard-2"].wait(timeout=PATIENCE) == 0
        statuses = [http.post(user_path(user, "recommend"), json={}).status_code for user in users]
        assert statuses == [200, 503, 200], "another process must not answer for the users of one that is away"
        assert_problem(http.post(user_path(users[1], "recommend"), json={}), 503, "process-away")
        cluster.restart("shard-2")
        assert all(client.recommend(user, k=1).num_events == 1 for user in users)
        for path in ("/v1/events:batch", "/admin/shards"):  # no one process is theirs
            assert http.post(path, json={}).status_code == 404
        assert http.get("/v1/items?text=item").status_code == 200


def ask_at_once(
    cluster: Cluster, user: str, call: str, body: dict[str, Any], times: int, answers: list[httpx.Response]
) -> None:
    """Send a call so many times at once; `answers` gets them as they come."""

    async def ask(crowd: httpx.AsyncClient) -> None:
        answers.append(await crowd.post(user_path(user, call), json=body))

    async def all_at_once() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE, limits=limits) as crowd:
            await asyncio.gather(*(ask(crowd) for _ in range(times)))

    asyncio.run(all_at_once())


def test_the_proxy_refuses_what_is_one_too_many_and_the_process_never_does(cluster: Cluster):
    settings, times = ServeSettings(), 80
    event = {"events": [{"item_id": "item-1", "timestamp": 1, "event_id": "e1"}]}
    calls: list[tuple[str, dict[str, Any], int]] = [
        ("events", event, settings.concurrent_writes),
        ("recommend", {"k": 1}, settings.concurrent_questions),
    ]
    held = cluster.files.held()
    assert held is not None
    name = held.owners[virtual_shard("ann")]
    elsewhere = next(user for user in map(str, range(100)) if held.owners[virtual_shard(user)] != name)
    with Client(cluster.url, tries=60) as client, httpx.Client(base_url=cluster.url, timeout=30) as http:
        client.keep("ann", [EventMessage("item-1", 1, "e0")])
        answers: dict[str, list[httpx.Response]] = {call: [] for call, _, _ in calls}
        threads = [
            threading.Thread(target=ask_at_once, args=(cluster, "ann", call, body, times, answers[call]))
            for call, body, _ in calls
        ]
        before = cluster.proxys_503s()
        cluster.shards[name].send_signal(signal.SIGSTOP)
        try:
            for thread in threads:
                thread.start()
            give_up = time.monotonic() + 30
            while any(len(answers[call]) < times - room for call, _, room in calls) and time.monotonic() < give_up:
                time.sleep(0.05)
            for call, body, _ in calls:
                assert_problem(http.post(user_path("ann", call), json=body), 503, "overloaded")
            assert_problem(http.delete(user_path("ann", "events/e0")), 503, "overloaded")
            assert http.post(user_path(elsewhere, "recommend"), json={"k": 1}).status_code == 200
        finally:
            cluster.shards[name].send_signal(signal.SIGCONT)
        for thread in threads:
            thread.join()
        for call, _, room in calls:
            refused = [answer for answer in answers[call] if answer.status_code != 200]
            assert (len(answers[call]), len(refused)) == (times, times - room)
            for answer in refused:
                assert assert_problem(answer, 503, "overloaded") == msgspec.json.decode(no_room().content)
                assert answer.headers["retry-after"] == "1"
        assert client.recommend("ann", k=1).num_events == 2
        own = httpx.get(f"http://127.0.0.1:{cluster.ports[name][0]}/metrics").text
        assert 'ksa_refused_total{code="overloaded"} 0.0' in own
        own_503s = {where: after - before[where] for where, after in cluster.proxys_503s().items()}
        rooms = {f"{name}:writing": times - calls[0][2] + 2, f"{name}:asking": times - calls[1][2] + 1}
        assert {where: count for where, count in own_503s.items() if count} == rooms
        told = httpx.get(f"http://127.0.0.1:{cluster.metrics_port}/metrics").text
        assert "ann" not in told
        assert httpx.get(f"http://127.0.0.1:{cluster.metrics_port}/").status_code == 404


def test_who_sends_slowly_through_the_proxy_takes_no_room(cluster: Cluster):
    head = b"POST /v1/users/ann/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\n"
    with Client(cluster.url, tries=1) as client, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", cluster.port))) for _ in range(40)]
        for connection in slow:
            connection.sendall(head + b'{"k"')
        for _ in range(5):
            client.recommend("ann", k=1)
        slow[0].sendall(b": 3}")
        assert slow[0].recv(100).startswith(b"HTTP/1.1 200")


def test_processes_come_and_go_under_load_and_fire_and_nothing_is_lost_or_doubled(cluster: Cluster, seed: int):
    draw = random.Random(seed)
    senders = [Sender(cluster.url, number, seed) for number in range(3)]
    for sender in senders:
        sender.start()
    try:
        for turn in range(NUM_MOVES):
            names = NAMES if turn % 2 == 0 else tuple(draw.sample(NAMES, 3))
            processes = {name: cluster.processes[name] for name in names}
            moved = False
            while not moved:
                with contextlib.suppress(Killed), httpx.Client(timeout=30) as http:
                    UnluckyMover(cluster, http, draw, num_kills=1 + (NUM_MOVES > 2)).move(processes, most=200)
                    moved = True
            time.sleep(0.2)
        give_up = time.monotonic() + PATIENCE
        while num_kept(senders) <= 50 and time.monotonic() < give_up:
            time.sleep(0.2)
    finally:
        for sender in senders:
            sender.stopping = True
        for sender in senders:
            sender.join()
    assert [sender.failure for sender in senders] == [None] * 3
    cluster.stop()
    expected = {user: Counter(ids) for sender in senders for user, ids in sender.acknowledged.items() if ids}
    kept = {user: ids for user, ids in cluster.kept().items() if user.startswith("sender")}
    assert kept == expected
    assert num_kept(senders) > 50
