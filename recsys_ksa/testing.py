"""Synthetic lifelong logs for tests and benchmarks, a prepared data set of one, a run on it. No torch, no polars."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys_ksa.cli import call_verb
from recsys_ksa.commands.config_files import config_file
from recsys_ksa.data.dataset import Dataset, open_dataset

if TYPE_CHECKING:
    from recsys_ksa.model.scoring import ScoringNetwork

DAY = 86_400
START = 1_577_836_800
"""2020-01-01, a Wednesday, in Unix seconds."""
EVENT_TYPES = ("view", "buy")
_HOURS = np.array([1, 1, 1, 1, 1, 2, 4, 6, 7, 7, 7, 8, 9, 8, 7, 7, 8, 10, 13, 15, 16, 14, 9, 4], dtype=np.float64)
"""Sessions by hour of the day."""
_WEEKDAYS = np.array([0.8, 0.9, 1.0, 1.5, 1.4, 0.8, 0.7])
"""Sessions by day of the week, from Wednesday on, as START is one."""


def lifelong_log(
    seed: int,
    users: int,
    items: int,
    *,
    median_length: float = 60.0,
    length_spread: float = 0.8,
    max_length: int = 5_000,
    days: int = 365,
    events_per_session: float = 4.0,
    repeat_share: float = 0.4,
    drift: float = 0.5,
    zipf: float = 1.0,
    event_types: bool = False,
    event_ids: bool = False,
) -> pa.Table:
    """Return a log of synthetic histories: user_id, item_id, timestamp and, if asked, event_type and event_id.

    Lengths are lognormal. Events come in sessions whose events share one timestamp (baskets); sessions follow a day
    and week rhythm. Items are Zipf-distributed around a taste that drifts over a user's life. Some events
    repeat an earlier item of the user, chosen by how far it is past its own rhythm. Rows are in random order; the
    same arguments give the same table.

    Args:
        seed: of everything drawn.
        users, items: how many; ids are `u<number>` and `i<number>`.
        median_length, length_spread: of the lognormal lengths (spread: its sigma); between 1 and `max_length`.
        days: the log's span; the last session of the log lies within it.
        events_per_session: mean, geometric; 1.0 gives every event a time of its own.
        repeat_share: probability that an event repeats an item that the user already had.
        drift: how far tastes move over the log, 0 (not at all) to 1 (all over the items).
        zipf: exponent of item popularity.
        event_types: add `view` and `buy`.
        event_ids: add ids that sort by arrival, as ULIDs do.
    """
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(np.log(median_length), length_spread, users))
    lengths = np.clip(np.rint(lengths), 1, max_length).astype(np.int64)
    weights = np.arange(1, items + 1, dtype=np.float64) ** -zipf
    popularity = np.cumsum(weights / weights.sum())
    place = random.permutation(items)
    rhythm = random.lognormal(np.log(14 * DAY), 0.7, items)

    user = np.repeat(np.arange(users), lengths)
    item, timestamp = np.empty(len(user), dtype=np.int64), np.empty(len(user), dtype=np.int64)
    ends = np.cumsum(lengths)
    for end, length in zip(ends.tolist(), lengths.tolist()):
        rows = slice(end - length, end)
        timestamp[rows] = _session_times(random, length, days, events_per_session)
        fresh = _tasteful_items(random, timestamp[rows], popularity, place, days, drift)
        item[rows] = _with_repeats(random, fresh, timestamp[rows], rhythm, repeat_share)

    shuffled = random.permutation(len(user))
    by_time = np.argsort(timestamp[shuffled], kind="stable")
    arrival = np.empty(len(user), dtype=np.int64)
    arrival[by_time] = np.arange(len(user))
    columns: dict[str, pa.Array] = {
        "user_id": pa.array([f"u{number}" for number in user[shuffled].tolist()]),
        "item_id": pa.array([f"i{number}" for number in item[shuffled].tolist()]),
        "timestamp": pa.array(timestamp[shuffled], type=pa.int64()),
    }
    if event_types:
        columns["event_type"] = pa.array(
            [EVENT_TYPES[is_buy] for is_buy in (random.random(len(user)) < 0.3).astype(int)]
        )
    if event_ids:
        columns["event_id"] = pa.array([f"e{number:012d}" for number in arrival.tolist()])
    return pa.table(columns)


def item_table(items: int, *, seed: int = 0, categories: int = 8) -> pa.Table:
    """Return an items file for `lifelong_log`: item_id, title, category (a few nulls)."""
    random = np.random.default_rng(seed)
    category = [None if number == 0 else f"c{number}" for number in random.integers(0, categories + 1, items).tolist()]
    return pa.table(
        {
            "item_id": [f"i{number}" for number in range(items)],
            "title": [f"Item {number}" for number in range(items)],
            "category": pa.array(category, type=pa.string()),
        }
    )


def renamed(log: pa.Table, column: str) -> pa.Table:
    """Return a log whose ids of `column` are others, in the same order: numbers stay, names do not."""
    names = [f"x{name}" for name in log[column].to_pylist()]
    return log.set_column(log.column_names.index(column), column, pa.array(names))


def prepared_dataset(
    directory: Path, log: pa.Table, *, items: pa.Table | None = None, arguments: Sequence[str] = (), config: str = ""
) -> Dataset:
    """Write `log` to Parquet under `directory`, run `ksa prepare` on it, and open the data set it made.

    Args:
        directory: an existing folder, such as a test's tmp_path; the data set is `directory`/ds.
        log: as `lifelong_log` returns it.
        items: an items file such as `item_table`; its `category` becomes a side feature unless `config` is given.
        arguments: more arguments of `ksa prepare`.
        config: text of a prepare file.
    """
    pq.write_table(log, directory / "log.parquet")
    command = [str(directory / "log.parquet"), "--out", str(directory / "ds"), *arguments]
    if items is not None:
        pq.write_table(items, directory / "items.parquet")
        command += ["--items", str(directory / "items.parquet")]
        config = config or 'items.side_features = ["category"]\n'
    if config:
        (directory / "prepare.toml").write_text(config, encoding="utf-8")
        command += ["--config", str(directory / "prepare.toml")]
    call_verb("prepare", command)
    return open_dataset(directory / "ds")


def trained_run(run: Path, data: Path, changes: Sequence[str] = (), *, steps: int = 0) -> Path:
    """Run `ksa train` with configs/smoke.toml for a few steps, and return the run directory it made.

    Args:
        run: the run directory to make.
        data: a prepared data set.
        changes: keys of the config as `--set` takes them, such as `model.attention=window`.
        steps: 0 writes a random model.
    """
    sets = [word for change in changes for word in ("--set", change)]
    call_verb(
        "train", [str(config_file("smoke.toml")), "--data", str(data), "--out", str(run), "--steps", str(steps), *sets]
    )
    return run


def random_run(
    run: Path, num_items: int, changes: Sequence[str] = (), alter: "Callable[[ScoringNetwork], None] | None" = None
) -> Path:
    """Write a run of random weights with no data set behind it, for what needs neither Polars nor training.

    Args:
        run: the run directory to make.
        num_items: ids are `i1` to `i<num_items>`; there are no event types.
        changes: keys of configs/smoke.toml as `--set` takes them.
        alter: changes the random network in place before it is written.
    """
    import torch
    from safetensors.torch import save_file

    from recsys_ksa import __version__
    from recsys_ksa.architectures import build_network
    from recsys_ksa.config import RunConfig, dump_config, load_config
    from recsys_ksa.model.features import FeatureSchema
    from recsys_ksa.model.fingerprint import release_hash, state_fingerprint
    from recsys_ksa.run import CONFIG_FILE, INFO_FILE, ITEMS_FILE, WEIGHTS_FILE, RunInfo

    config = load_config(RunConfig, config_file("smoke.toml"), changes)
    torch.manual_seed(config.seed)
    network = build_network(config.model, FeatureSchema(num_items + 1))
    if alter is not None:
        alter(network)
    info = RunInfo(
        name=run.name,
        data_hash="none",
        split_hash="none",
        training_span="any",
        tie="arrival",
        clock="unix",
        feature_schema=network.features.as_dict(),
        exclude_seen=False,
        longest_trained_history=0,
        state_fingerprint=state_fingerprint(network),
        release_hash=release_hash(network),
        code_version=__version__,
        num_items=num_items + 1,
    )
    run.mkdir(parents=True)
    items = [None, *(f"i{n}" for n in range(1, num_items + 1))]
    pq.write_table(pa.table({"item_id": items, "count": [0, *[1] * num_items]}), run / ITEMS_FILE)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, run / WEIGHTS_FILE)
    (run / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    (run / INFO_FILE).write_text(info.model_dump_json(), encoding="utf-8")
    return run


def _session_times(random: np.random.Generator, length: int, days: int, events_per_session: float) -> NDArray[np.int64]:
    """[length] times, ascending; events of a session share theirs."""
    sessions = np.cumsum(random.random(length) < 1.0 / events_per_session)
    sessions -= sessions[0]
    count = int(sessions[-1]) + 1
    first_day = random.uniform(0, days / 2)
    day = np.floor(random.uniform(first_day, days, 4 * count)).astype(np.int64)
    weight = _WEEKDAYS[day % 7]
    day = np.sort(random.choice(day, count, p=weight / weight.sum()))
    hour = random.choice(24, count, p=_HOURS / _HOURS.sum())
    starts = np.sort(START + day * DAY + hour * 3_600 + random.integers(0, 3_600, count))
    return starts[sessions]


def _tasteful_items(
    random: np.random.Generator,
    timestamp: NDArray[np.int64],
    popularity: NDArray[np.float64],
    place: NDArray[np.int64],
    days: int,
    drift: float,
) -> NDArray[np.int64]:
    """[length] items: half from the whole, half from a neighbourhood on the ring of items that moves with time."""
    num_items = len(popularity)
    ranks = np.minimum(np.searchsorted(popularity, random.random(len(timestamp))), num_items - 1)
    centre = random.random() + drift * (timestamp - START) / (days * DAY) * random.choice([-1.0, 1.0])
    width = max(num_items // 20, 1)
    near = np.floor(centre * num_items).astype(np.int64) + np.rint(random.normal(0, width, len(timestamp))).astype(int)
    return np.where(random.random(len(timestamp)) < 0.5, place[ranks], near % num_items)


def _with_repeats(
    random: np.random.Generator,
    fresh: NDArray[np.int64],
    timestamp: NDArray[np.int64],
    rhythm: NDArray[np.float64],
    repeat_share: float,
) -> NDArray[np.int64]:
    """Replace some events by an earlier item of the user, the one of a few drawn that is most overdue."""
    items = fresh.copy()
    repeats = np.flatnonzero(random.random(len(items)) < repeat_share)
    draws = random.random((len(items), 4))
    last: dict[int, int] = {}
    due = set(repeats.tolist())
    times = timestamp.tolist()
    for row in range(len(items)):
        if row in due and row:
            items[row] = _most_overdue(items[(draws[row] * row).astype(np.int64)].tolist(), times[row], last, rhythm)
        last[int(items[row])] = times[row]
    return items


def _most_overdue(items: list[int], time: int, last: dict[int, int], rhythm: NDArray[np.float64]) -> int:
    return max(items, key=lambda item: (time - last[item]) / rhythm[item])
