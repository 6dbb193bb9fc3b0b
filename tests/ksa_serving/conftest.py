import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from held_port import held_port

from ksa_serving.app import create_app
from ksa_serving.auth import Tokens
from ksa_serving.command import listen
from ksa_serving.event_log import EventLog
from ksa_serving.memory_store import MemoryStateStore
from ksa_serving.redis_engine import RedisEngine
from ksa_serving.release import Release
from ksa_serving.server import ReadyServer, server_config
from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings
from ksa_serving.testing import toy_release
from recsys_ksa.testing import lifelong_log, prepared_dataset, trained_run

NOW = 1_700_000_000


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Return a function that makes a service over a log in `tmp_path`, with a clock that stands at NOW."""
    made: list[Service] = []

    def make(release: Release | None = None, settings: ServeSettings | None = None, folder: str = "state") -> Service:
        release = release or toy_release()
        (tmp_path / folder).mkdir(exist_ok=True)
        log = EventLog(tmp_path / folder, release.tie)
        store = MemoryStateStore((settings or ServeSettings()).state_bytes)
        made.append(Service(release, log, store, settings, clock=lambda: NOW))
        return made[-1]

    yield make
    for service in made:
        service.log.close()


@contextlib.contextmanager
def serving(service: Service, tokens: Tokens | None = None) -> Iterator[httpx.Client]:
    """A real uvicorn on a free loopback port, in a thread, and a client of it."""
    listener = listen("127.0.0.1", 0)
    server = ReadyServer(server_config(create_app(service, tokens=tokens), service), service, "ready")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def client(make_service: Callable[..., Service]) -> Iterator[httpx.Client]:
    with serving(make_service()) as client:
        yield client


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One server for the tests of a module that keep out of each other's way."""
    log = EventLog(tmp_path_factory.mktemp("state"), "arrival")
    with serving(Service(toy_release(), log, MemoryStateStore(10**6), clock=lambda: NOW)) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 50 items, written by `ksa train --steps 0`."""
    folder = tmp_path_factory.mktemp("tiny")
    log = lifelong_log(0, 20, 50, event_types=True)
    return trained_run(folder / "run", prepared_dataset(folder, log, arguments=["--tie", "arrival"]).path)


@pytest.fixture
def serve_in_thread() -> Any:
    return serving


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on a free loopback port, without persistence."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed; packaging/system.sh installs it")
    folder = tmp_path_factory.mktemp("redis")
    with held_port() as port:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        assert server.poll() is None, "redis-server ended"
        yield f"redis://127.0.0.1:{port}/0"
        server.terminate()
        server.wait()


@pytest.fixture
def patient_redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address, for services that wait for it also where the machine has other work."""
    patient = partial(RedisEngine, timeout=120, whole_timeout=120)
    monkeypatch.setattr("ksa_serving.redis_engine.RedisEngine", patient)
    return redis_url
