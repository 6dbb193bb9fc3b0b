"""`ksa recommend`: answer for one user whose events are in a file, or whom a running service knows."""

import argparse
import csv
import json
from pathlib import Path

from recsys_ksa.cli import Verb, add_user_features, call_verb
from recsys_ksa.errors import DataError, SchemaError, UsageError

Columns = dict[str, list[str]]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", help="run directory or bundle")
    parser.add_argument("--url", help="ask this running service, for --user, instead of RUN and --events")
    parser.add_argument("--user", metavar="ID", help="whom the service knows")
    parser.add_argument(
        "--events",
        metavar="FILE",
        type=Path,
        help="one user's events, .csv or .parquet: item_id, timestamp; event_type, event_id, value",
    )
    add_user_features(parser)
    parser.add_argument("--k", type=int, default=10, help="how many items (default 10)")
    parser.add_argument("--request-time", type=int, help="Unix seconds of the request (default: none)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--again", action="store_true", help="only items the user already had")
    chosen.add_argument("--new", action="store_true", help="only items the user never had")


def _run(args: argparse.Namespace) -> None:
    if args.url is not None:
        _ask_service(args)
        return
    if args.run is None or args.events is None:
        raise UsageError("ksa recommend: expected RUN and --events FILE, or --url URL and --user ID. See --help.")
    columns = read_events(args.events)
    from recsys_ksa.recommender import Recommender

    rec = Recommender.load(args.run)
    state = rec.append(
        rec.new_state(),
        columns["item_id"],
        _whole_numbers(args.events, columns["timestamp"]),
        event_types=_optional(columns, "event_type"),
        features=_values(args.events, columns) if rec.event_features.value_edges else None,
        event_ids=_optional(columns, "event_id"),
    )
    exclude = True if args.new else False if args.again else None
    answer = rec.recommend(
        state, args.k, args.request_time, exclude_seen=exclude, only_seen=args.again, user=args.user_features
    )
    known = state.num_events - state.num_unknown
    print(f"{state.num_events} events ({known} of known items), state {state.nbytes / 1024:.1f} KiB, {rec.index.kind}")
    if rec.popularity is not None:
        print(f"items as popular as on the days before {rec.popularity.as_of} s (`ksa index --popularity-as-of`)")
    longest = rec.run.info.longest_trained_history
    if state.num_events > longest:
        print(f"note: the longest history trained on has {longest} events; this one is longer")
    titles = rec.run.items.title
    for rank, (item_id, score) in enumerate(answer, start=1):
        title = titles[rec.run.items.index_of[item_id]] if titles else None
        print(f"{rank:>4}  {score:>9.4f}  {item_id}{'  ' + title if title else ''}")


def _ask_service(args: argparse.Namespace) -> None:
    """Let the service's own verb ask; nothing is loaded here."""
    if args.user is None or args.run is not None or args.events is not None:
        raise UsageError("ksa recommend: expected --user ID beside --url, and neither RUN nor --events. See --help.")
    which = "again" if args.again else "new" if args.new else "all"
    when = [] if args.request_time is None else ["--request-time", str(args.request_time)]
    told = ["--user-features", json.dumps(args.user_features)]
    call_verb("ask", [args.user, "--url", args.url, "--k", str(args.k), "--list", which, *when, *told])


def read_events(file: Path) -> Columns:
    """Read a CSV or Parquet file of one user's events as columns of strings; empty cells are ''.

    Raises:
        DataError: the file is missing or neither CSV nor Parquet.
        SchemaError: item_id or timestamp is missing.
    """
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(file)
            columns = {
                name: ["" if value is None else str(value) for value in table[name].to_pylist()]
                for name in table.column_names
            }
        else:
            with file.open(newline="", encoding="utf-8") as lines:
                reader = csv.DictReader(lines)
                rows = list(reader)
            columns = {name: [row[name] or "" for row in rows] for name in reader.fieldnames or ()}
    except OSError as error:
        raise DataError(f"{file}: expected a file of events, got: {error.strerror}. Check the path.") from error
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: expected a .csv or .parquet file of events, got: {error}.") from error
    for name in ("item_id", "timestamp"):
        if name not in columns:
            have = ", ".join(columns) or "none"
            raise SchemaError(f"{file}: expected the column {name}, got the columns {have}. Rename it.")
    if len(set(columns.get("user_id", []))) > 1:
        raise DataError(f"{file}: expected the events of one user, got several user_ids. Filter the file.")
    return columns


def _whole_numbers(file: Path, values: list[str]) -> list[int]:
    for value in values:
        if not value.strip().lstrip("-").isdecimal():
            raise SchemaError(f"{file}: timestamp: expected whole Unix seconds, got {value!r}. Mend the file.")
    return [int(value) for value in values]


def _optional(columns: Columns, name: str) -> list[str | None] | None:
    return [value or None for value in columns[name]] if name in columns else None


def _values(file: Path, columns: Columns) -> dict[str, list[float | None]]:
    try:
        return {"value": [float(value) if value else None for value in columns["value"]]} if "value" in columns else {}
    except ValueError as error:
        raise SchemaError(f"{file}: value: expected numbers, got: {error}.") from error


verb = Verb(
    summary="answer for one user whose events are in a CSV or Parquet file",
    example="ksa recommend runs/ksa --events history.csv --k 10",
    configure=_configure,
    run=_run,
)
