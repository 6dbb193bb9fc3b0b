"""Realistic lifelong logs of any size, drawn from a seed, written in parts in bounded memory.

Lengths of histories are lognormal, up to 100,000. Events come in sessions that follow a day and week rhythm; some
events of a session share a second. Items are Zipf-distributed; half of them come from a taste of the user that
drifts over the log. Some events repeat an earlier item of the user, recent ones more often.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.write import atomic_directory

DAY = 86_400
START = 1_577_836_800
"""2020-01-01, a Wednesday, in Unix seconds."""
EVENT_TYPES = ("view", "cart", "buy")
USERS_PER_BLOCK = 2_048
_HOURS = np.array([1, 1, 1, 1, 1, 2, 4, 6, 7, 7, 7, 8, 9, 8, 7, 7, 8, 10, 13, 15, 16, 14, 9, 4], dtype=np.float64)
"""Sessions by hour of the day."""
_WEEKDAYS = np.array([0.8, 0.9, 1.0, 1.5, 1.4, 0.8, 0.7])
"""Sessions by day of the week, from Wednesday on, as START is one."""


@dataclass(frozen=True)
class SynthConfig:
    """What a log looks like."""

    events: int
    seed: int = 0
    items: int = 100_000
    days: int = 730
    """Span of the log."""
    median_length: float = 60.0
    length_spread: float = 1.5
    """Sigma of the lognormal lengths."""
    max_length: int = 100_000
    events_per_session: float = 6.0
    repeat_share: float = 0.4
    drift: float = 0.5
    """How far a taste moves over the log, 0 to 1 (all over the items)."""
    zipf: float = 1.0
    event_types: bool = False
    event_ids: bool = False


def synthesize(config: SynthConfig, target: Path) -> Iterator[int]:
    """Write the log as Parquet parts into the folder `target`; yield the events written so far after each part.

    The same config gives the same rows. A part holds the events of some users, by time.

    Raises:
        DataError: `target` exists.
    """
    with atomic_directory(target) as folder:
        written = 0
        for block in blocks(config):
            number = written
            frame = _as_log(block, number, config)
            pq.write_table(to_arrow(frame), folder / f"part-{number:012d}.parquet", compression="zstd")
            written += frame.height
            yield written


@dataclass(frozen=True)
class Block:
    """Events of some users, one row an event."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    timestamp: NDArray[np.int64]
    event_type: NDArray[np.int64]


def blocks(config: SynthConfig) -> Iterator[Block]:
    """Yield blocks of `USERS_PER_BLOCK` users until there are `config.events` events; users by number."""
    world = np.random.default_rng([config.seed, 0])
    weights = np.arange(1, config.items + 1, dtype=np.float64) ** -config.zipf
    popularity, place = np.cumsum(weights / weights.sum()), world.permutation(config.items)
    left, number = config.events, 0
    while left > 0:
        random = np.random.default_rng([config.seed, 1, number])
        lengths = np.exp(random.normal(np.log(config.median_length), config.length_spread, USERS_PER_BLOCK))
        lengths = np.clip(np.rint(lengths), 1, config.max_length).astype(np.int64)
        ends = np.minimum(np.cumsum(lengths), left)
        lengths = np.diff(ends, prepend=0)
        user = np.repeat(np.arange(USERS_PER_BLOCK), lengths)
        timestamp = _times(random, user, config)
        fresh = _items(random, user, timestamp, popularity, place, config)
        source = _sources(random, user, lengths, config.repeat_share)
        kind = np.searchsorted([0.85, 0.95], random.random(len(user)))
        yield Block(user + number * USERS_PER_BLOCK, fresh[source], timestamp, kind)
        left, number = left - len(user), number + 1


def _times(random: np.random.Generator, user: NDArray, config: SynthConfig) -> NDArray[np.int64]:
    """[T] times, ascending within each user."""
    begins = np.append(True, user[1:] != user[:-1]) if len(user) else np.empty(0, bool)
    opens = begins | (random.random(len(user)) < 1.0 / config.events_per_session)
    session, owner = np.cumsum(opens) - 1, user[opens]
    count = len(owner)
    joined = random.uniform(0, 0.7, USERS_PER_BLOCK)[owner]
    week = np.floor((joined + random.random(count) * (1 - joined)) * config.days / 7)
    day = np.minimum(week * 7 + random.choice(7, count, p=_WEEKDAYS / _WEEKDAYS.sum()), config.days - 1)
    hour = random.choice(24, count, p=_HOURS / _HOURS.sum())
    start = (day * DAY + hour * 3_600).astype(np.int64) + random.integers(0, 3_600, count)
    start = start[np.lexsort((start, owner))]
    pause = np.floor(random.exponential(20, len(user)) * (random.random(len(user)) < 0.7)).astype(np.int64)
    pause[opens] = 0
    since = np.cumsum(pause)
    time = START + start[session] + since - since[np.flatnonzero(opens)][session]
    order = np.lexsort((time, user))  # a long session may run into the next
    return time[order]


def _items(
    random: np.random.Generator,
    user: NDArray,
    timestamp: NDArray,
    popularity: NDArray[np.float64],
    place: NDArray,
    config: SynthConfig,
) -> NDArray[np.int64]:
    """[T] items: half from the whole, half from a neighbourhood on the ring of items that moves with time."""
    ranks = np.minimum(np.searchsorted(popularity, random.random(len(user))), config.items - 1)
    centre, direction = random.random(USERS_PER_BLOCK), random.choice([-1.0, 1.0], USERS_PER_BLOCK)
    at = centre[user] + config.drift * direction[user] * (timestamp - START) / (config.days * DAY)
    width = max(config.items // 50, 1)
    near = np.floor(at * config.items + random.normal(0, width, len(user))).astype(np.int64) % config.items
    return np.where(random.random(len(user)) < 0.5, place[ranks], near)


def _sources(random: np.random.Generator, user: NDArray, lengths: NDArray, share: float) -> NDArray[np.int64]:
    """[T] the row whose item each row has: its own, or for a repeat that of an earlier row of the user."""
    row = np.arange(len(user))
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    back = np.floor((row - first) * random.random(len(user)) ** 3).astype(np.int64) + 1
    repeats = (row > first) & (random.random(len(user)) < share)
    source = np.where(repeats, np.maximum(row - back, first), row)
    while not np.array_equal(jumped := source[source], source):  # a repeat of a repeat is one of the first
        source = jumped
    return source


def _as_log(block: Block, first: int, config: SynthConfig) -> pl.DataFrame:
    """Return a block as a log, by time."""
    order = np.argsort(block.timestamp, kind="stable")
    numbers = pl.DataFrame({"user": block.user[order], "item": block.item[order]})
    columns = {"timestamp": pl.Series(block.timestamp[order])}
    if config.event_types:
        columns["event_type"] = pl.Series(EVENT_TYPES)[block.event_type[order]]
    if config.event_ids:
        columns["event_id"] = pl.select(pl.format("e{}", pl.int_range(len(order)) + 10**12 + first)).to_series()
    ids = numbers.select(pl.format("u{}", "user").alias("user_id"), pl.format("i{}", "item").alias("item_id"))
    return ids.with_columns(**columns)
