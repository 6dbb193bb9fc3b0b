"""Three shards behind a real HAProxy that hashes the user id in the path: each user is one shard's."""

import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ksa_serving.client import Client
from ksa_serving.event_log import EventLog
from ksa_serving.messages import EventMessage

pytestmark = pytest.mark.service
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
CONFIG = Path(__file__).parents[2] / "serving" / "haproxy.cfg"
NUM_SHARDS = 3


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Cluster:
    """Shards of the toy model and the proxy before them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ports = [free_port() for _ in range(NUM_SHARDS)]
        self.shards = [self.start(shard) for shard in range(NUM_SHARDS)]
        self.port = free_port()
        text = CONFIG.read_text().replace(":8000", f":{self.port}")
        for shard, port in enumerate(self.ports):
            text = text.replace(f":{8001 + shard} ", f":{port} ")
        (folder / "haproxy.cfg").write_text(text)
        assert HAPROXY is not None
        subprocess.run([HAPROXY, "-c", "-q", "-f", str(folder / "haproxy.cfg")], check=True)
        self.proxy = subprocess.Popen([HAPROXY, "-db", "-f", str(folder / "haproxy.cfg")])
        self.url = f"http://127.0.0.1:{self.port}"
        self.wait()

    def start(self, shard: int) -> Any:
        command = [sys.executable, str(Path(__file__).parent / "toy_server.py"), str(self.state_dir(shard))]
        process = subprocess.Popen([*command, str(self.ports[shard])], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        return process

    def state_dir(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}"

    def wait(self) -> None:
        for _ in range(300):
            try:
                if httpx.get(f"{self.url}/livez").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError("the proxy does not answer")

    def stop(self) -> None:
        self.proxy.terminate()
        self.proxy.wait()
        for shard in self.shards:
            shard.terminate()
            shard.wait()
            shard.stdout.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if HAPROXY is None:
        pytest.skip("haproxy is not installed; packaging/system.sh installs it")
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


def test_users_stay_on_their_shard_and_a_killed_shard_loses_and_doubles_nothing(cluster: Cluster, seed: int):
    draw = random.Random(seed)
    sent: Counter[str] = Counter()
    acknowledged: Counter[str] = Counter()
    killed = 0
    with Client(cluster.url, tries=60, timeout=5) as client:
        client._sleep = lambda seconds: time.sleep(min(seconds, 0.1))
        for turn in range(300):
            user = f"user/{draw.randrange(30)}"
            events = [EventMessage(f"item-{n % 50}", 1000 + n, f"e{n}") for n in range(sent[user], sent[user] + 3)]
            sent[user] += 3
            if turn in (100, 200):  # kill -9 in the middle; the sender tries again until the shard is back
                killed = draw.randrange(NUM_SHARDS)
                cluster.shards[killed].send_signal(signal.SIGKILL)
                cluster.shards[killed].wait()
                cluster.shards[killed].stdout.close()
                cluster.shards[killed] = cluster.start(killed)
            answer = client.keep(user, events)
            assert {result.status for result in answer.results} <= {"accepted", "duplicate"}
            acknowledged[user] += 3
            if turn % 5 == 0:
                assert client.recommend(user, k=3).num_events == acknowledged[user]
    cluster.stop()
    kept: Counter[str] = Counter()
    per_shard: list[int] = []
    for shard in range(NUM_SHARDS):
        log = EventLog(cluster.state_dir(shard), "arrival")
        for owner in log.owners():
            assert owner.user_id not in kept, "one user on two shards"
            _, events = log.read(owner)
            assert len({event.event_id for event in events}) == len(events), "applied twice"
            kept[owner.user_id] = len(events)
        per_shard.append(log.counts()[0])
        log.close()
    assert kept == acknowledged
    assert min(per_shard) > 0


def test_a_drained_shard_answers_what_it_has_and_the_proxy_stays_up(cluster: Cluster):
    with Client(cluster.url) as client:
        for n in range(30):
            client.keep(f"u{n}", [EventMessage("item-1", 1)])
        cluster.shards[1].terminate()
        assert cluster.shards[1].wait(timeout=30) == 0
        answered = refused = 0
        for n in range(30):
            status = httpx.post(f"{cluster.url}/v1/users/u{n}/recommend", json={}).status_code
            answered += status == 200
            refused += status == 503
        assert answered + refused == 30
        assert refused > 0, "another shard must not answer for the users of one that is away"
        assert answered > 0
        cluster.shards[1].stdout.close()
        cluster.shards[1] = cluster.start(1)
        client._sleep = lambda seconds: time.sleep(0.1)
        client._tries = 60
        assert all(client.recommend(f"u{n}", k=1).num_events == 1 for n in range(30))
