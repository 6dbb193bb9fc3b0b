"""`ksa consume`: keep the events of a Kafka topic in a running service, or in the shards behind a proxy."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

from recsys_ksa.cli import Verb
from recsys_ksa.errors import UsageError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topic", metavar="TOPIC", help="messages: key = user id, value = one event as JSON")
    parser.add_argument(
        "--brokers", required=True, metavar="HOST:PORT,...", help="of Kafka or what speaks its protocol"
    )
    parser.add_argument("--group", default="ksa", help="consumer group (default: %(default)s)")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: %(default)s)")
    parser.add_argument("--token-variable", default="KSA_TOKEN", metavar="NAME", help="variable with the bearer token")
    parser.add_argument(
        "--dead-letters", type=Path, required=True, metavar="FILE", help="where messages go that are never kept"
    )
    parser.add_argument(
        "--kafka", action="append", default=[], metavar="NAME=VALUE", help="a setting of librdkafka, as for TLS"
    )


def _run(args: argparse.Namespace) -> None:
    """Consume until SIGTERM or SIGINT."""
    import msgspec

    from ksa_serving.client import Client
    from ksa_serving.consumption import DeadLetter, consume
    from ksa_serving.kafka_source import KafkaSource

    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    settings = dict(map(_setting, args.kafka))
    with Client(args.url, os.environ.get(args.token_variable)) as client, _opened(args.dead_letters) as letters:

        def bury(letter: DeadLetter) -> None:
            letters.write(msgspec.json.encode(letter) + b"\n")
            letters.flush()
            os.fsync(letters.fileno())

        source = KafkaSource(args.brokers, args.topic, args.group, settings)
        print(f"consuming {args.topic} as {args.group} into {args.url}", file=sys.stderr, flush=True)
        try:
            outcomes = consume(source, client.keep, bury, lambda: stopping)
        finally:
            source.close()
    print(", ".join(f"{count} {status}" for status, count in sorted(outcomes.items())) or "no events")


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"ksa consume: --kafka: expected NAME=VALUE, got {text!r}.")
    return name, value


def _opened(file: Path) -> BinaryIO:
    """Return the file of dead letters, to be added to; its owner's alone, for what users did is in it."""
    try:
        letters = open(file, "ab")  # noqa: SIM115 - the caller closes it
        os.chmod(file, 0o600)
    except OSError as error:
        raise UsageError(f"ksa consume: --dead-letters {file}: expected a file, got: {error.strerror}.") from error
    return letters


verb = Verb(
    summary="keep the events of a Kafka topic, each position committed after its events are on disk",
    example="ksa consume events --brokers 127.0.0.1:9092 --url http://127.0.0.1:8000 --dead-letters dead.jsonl",
    configure=_configure,
    run=_run,
)
