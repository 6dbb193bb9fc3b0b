"""`ksa consume`: keep the events of a Kafka topic in a running service, or in the shards behind a proxy."""

import argparse
import os
import signal
import sys
from pathlib import Path

from recsys_ksa.cli import Verb


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
    settings = dict(pair.split("=", 1) for pair in args.kafka)
    with Client(args.url, os.environ.get(args.token_variable)) as client, open(args.dead_letters, "ab") as letters:
        os.chmod(args.dead_letters, 0o600)  # what users did is in it

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


verb = Verb(
    summary="keep the events of a Kafka topic, each position committed after its events are on disk",
    example="ksa consume events --brokers 127.0.0.1:9092 --url http://127.0.0.1:8000 --dead-letters dead.jsonl",
    configure=_configure,
    run=_run,
)
