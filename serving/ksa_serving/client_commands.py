"""Verbs that talk to a running service: `ksa events` sends a log, `ksa ask` asks what is next."""

import argparse
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_ksa.cli import Verb, add_user_features
from recsys_ksa.errors import DataError, SchemaError

if TYPE_CHECKING:
    from ksa_serving.client import Client
    from ksa_serving.messages import EventMessage

COLUMNS = ("user_id", "item_id", "timestamp")
OPTIONAL = ("event_id", "event_type", "value")
CALL_EVENTS = 500
"""Events of one user in one call."""
CALL_USERS = 64
"""Users in one call."""


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: %(default)s)")
    parser.add_argument(
        "--token-variable", default="KSA_TOKEN", metavar="NAME", help="environment variable with the bearer token"
    )


def _client(args: argparse.Namespace) -> "Client":
    from ksa_serving.client import Client

    return Client(args.url, os.environ.get(args.token_variable))


def _configure_events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path, metavar="LOG", help=".csv or .parquet: user_id, item_id, timestamp, ...")
    _address(parser)


def _run_events(args: argparse.Namespace) -> None:
    """Send a log, oldest events first within each user; sending it again keeps nothing twice."""
    from collections import Counter

    from tqdm import tqdm

    columns = read_log(args.log)
    outcomes: Counter[str] = Counter()
    with _client(args) as client, tqdm(total=len(columns["user_id"]), unit=" events") as bar:
        for call in calls(columns):
            for answer in client.keep_batch(call).answers:
                outcomes.update(
                    result.status if result.reason is None else f"{result.status} ({result.reason})"
                    for result in answer.results
                )
                bar.update(len(answer.results))
    print(", ".join(f"{count} {status}" for status, count in sorted(outcomes.items())) or "no events")


def read_log(file: Path) -> dict[str, list[Any]]:
    """Return a log's columns: user and item ids as text, timestamps as whole numbers; None where there is none.

    Raises:
        DataError: the file cannot be read.
        SchemaError: a column is missing, a row lacks one of those needed, or a timestamp is no whole number.
    """
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file) if file.suffix == ".parquet" else csv.read_csv(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: expected a .csv or .parquet log, got: {error}.") from error
    for name in COLUMNS:
        if name not in table.column_names:
            have = ", ".join(table.column_names)
            raise SchemaError(f"{file}: expected the column {name}, got the columns {have}. Rename it.")
    try:
        kinds = {"timestamp": pa.int64(), "value": pa.float64()}
        names = [*COLUMNS, *(name for name in OPTIONAL if name in table.column_names)]
        columns = {name: table[name].cast(kinds.get(name, pa.string())).to_pylist() for name in names}
    except pa.ArrowException as error:
        raise SchemaError(f"{file}: expected whole seconds in timestamp and text in ids, got: {error}.") from error
    for name in COLUMNS:
        for row, value in enumerate(columns[name], start=1):
            if value in (None, ""):
                raise SchemaError(f"{file}: expected {name} in every row, got none in row {row}. Leave such rows out.")
    return columns


def calls(columns: dict[str, list[Any]]) -> "Iterator[dict[str, list[EventMessage]]]":
    """Yield events by user, as many as one call may hold, each user's in the order of time."""
    from ksa_serving.messages import EventMessage

    names = [name for name in ("item_id", "timestamp", *OPTIONAL) if name in columns]
    order = sorted(range(len(columns["user_id"])), key=lambda row: (columns["user_id"][row], columns["timestamp"][row]))
    call: dict[str, list[EventMessage]] = {}
    for user_id, rows in groupby(order, key=lambda row: columns["user_id"][row]):
        for row in rows:
            call.setdefault(user_id, []).append(EventMessage(**{name: columns[name][row] for name in names}))
            if sum(map(len, call.values())) == CALL_EVENTS:
                yield call
                call = {}
        if len(call) == CALL_USERS:
            yield call
            call = {}
    if call:
        yield call


def _configure_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("user", metavar="USER", help="a user id")
    _address(parser)
    parser.add_argument("--k", type=int, default=10, help="how many items (default 10)")
    parser.add_argument("--request-time", type=int, help="Unix seconds (default: the server's clock)")
    add_user_features(parser)
    parser.add_argument("--list", choices=["all", "again", "new"], default="all", help="of which items")
    parser.add_argument("--why", action="store_true", help="explain the first item")


def _run_ask(args: argparse.Namespace) -> None:
    """Print a running service's answer for one user."""
    fields: dict[str, Any] = {"user": args.user_features}
    if args.request_time is not None:
        fields["request_time"] = args.request_time
    with _client(args) as client:
        answer = client.recommend(args.user, k=args.k, list=args.list, **fields)
        source = "" if answer.state_source is None else f"state from {answer.state_source}, "
        print(f"{answer.num_events} events, {source}model {answer.model_version[:12]}")
        for rank, item in enumerate(answer.items, start=1):
            print(f"{rank:>4}  {item.score:>9.4f}  {item.item_id}")
        if args.why and answer.items:
            why = client.explain(args.user, answer.items[0].item_id, **fields)
            print(f"{why.summary_attention:.1%} of the attention on summaries; own items gave {why.own_item_bias:+.4f}")
            for chunk in why.chunks:
                items = ", ".join(dict.fromkeys(event.item_id for event in chunk.events))
                print(f"  {chunk.attention:>6.1%} of it on chunk {chunk.chunk}, seen as {chunk.seen_as}: {items}")


events_verb = Verb(
    summary="send a log of events to a running service",
    example="ksa events log.parquet --url http://127.0.0.1:8000",
    configure=_configure_events,
    run=_run_events,
)
ask_verb = Verb(
    summary="ask a running service what is next for one user",
    example="ksa ask ann --url http://127.0.0.1:8000 --k 10 --why",
    configure=_configure_ask,
    run=_run_ask,
)
