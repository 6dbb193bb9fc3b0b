"""The Kafka source against a broker of librdkafka's own: the real protocol over TCP, groups and commits included."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ksa_serving.client import Client
from ksa_serving.consumption import DeadLetter, consume
from ksa_serving.event_log import EventLog
from ksa_serving.events import Owner
from ksa_serving.service import Service

kafka: Any = pytest.importorskip("confluent_kafka")
pytestmark = pytest.mark.service
USERS = 6


@pytest.fixture
def brokers() -> Iterator[str]:
    """Addresses of a cluster that lives as long as its first client."""
    owner = kafka.Producer({"test.mock.num.brokers": 1, "log_level": 0})
    found = owner.list_topics(timeout=120).brokers.values()
    yield ",".join(f"{broker.host}:{broker.port}" for broker in found)
    owner.flush(1)


def send(brokers: str, first: int, count: int) -> None:
    producer = kafka.Producer({"bootstrap.servers": brokers})
    for n in range(first, first + count):
        event = {"item_id": f"item-{n}", "timestamp": 1000 + n, "event_id": f"e{n}"}
        producer.produce("events", key=f"u{n % USERS}", value=json.dumps(event))
    assert producer.flush(120) == 0


def check_log(log: EventLog, count: int) -> None:
    for user in range(USERS):
        items = [event.item_id for event in log.read(Owner(f"u{user}"))[1]]
        assert items == [f"item-{n}" for n in range(count) if n % USERS == user]


def test_consumers_that_die_before_they_commit_lose_and_double_nothing(
    brokers: str, make_service: Callable[..., Service], serve_in_thread: Any
):
    from ksa_serving.kafka_source import KafkaSource

    class DiesBeforeCommit(KafkaSource):
        def commit(self, positions: Any) -> None:
            raise ConnectionError("power loss")

    send(brokers, 0, 300)
    service = make_service()
    letters: list[DeadLetter] = []
    with serve_in_thread(service) as http, Client(str(http.base_url)) as client:
        dying = DiesBeforeCommit(brokers, "events", "ksa", {"session.timeout.ms": "6000"})
        with pytest.raises(ConnectionError):
            consume(dying, client.keep, letters.append, lambda: False, most=100)
        dying.close()
        assert sum(service.log.head(Owner(f"u{user}")).num_events for user in range(USERS)) > 0
        done = threading.Event()

        def work(source: KafkaSource) -> None:
            with Client(str(http.base_url)) as own:
                consume(source, own.keep, letters.append, done.is_set, most=50)
            source.close()

        sources = [KafkaSource(brokers, "events", "ksa", {"session.timeout.ms": "6000"}) for _ in range(2)]
        threads = [threading.Thread(target=work, args=(source,)) for source in sources]  # partitions move to the second
        for thread in threads:
            thread.start()
        send(brokers, 300, 200)
        deadline = time.monotonic() + 300
        while sum(service.log.counts()[1:]) < 500 and time.monotonic() < deadline:
            time.sleep(0.1)
        done.set()
        for thread in threads:
            thread.join()
        check_log(service.log, 500)
    assert letters == []


def test_the_verb_consumes_until_it_is_told_to_stop(
    brokers: str, make_service: Callable[..., Service], serve_in_thread: Any, tmp_path: Path
):
    import signal
    import subprocess
    import sys

    send(brokers, 0, 60)
    producer = kafka.Producer({"bootstrap.servers": brokers})
    producer.produce("events", key="u0", value=b"no event")
    assert producer.flush(120) == 0
    service = make_service()
    letters = tmp_path / "dead.jsonl"
    with serve_in_thread(service) as http:
        code = "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "consume", "events", "--brokers", brokers, "--url", str(http.base_url)]
        process = subprocess.Popen([*command, "--dead-letters", str(letters)], stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (
            service.log.counts()[1] == 60 and letters.exists() and letters.read_bytes()
        ):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        check_log(service.log, 60)
    assert "60 accepted" in out
    assert json.loads(letters.read_text())["reason"] == "invalid-event"
