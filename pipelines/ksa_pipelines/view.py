"""A smaller data set out of a prepared one: caps, bots and cores, which increments could not keep up with."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.bots import BotRule, find_bots
from ksa_pipelines.caps import capped_since
from ksa_pipelines.checks import NothingLeftError
from ksa_pipelines.config import ColumnsConfig, PrepareConfig, ReadConfig
from ksa_pipelines.histories import as_events
from ksa_pipelines.ingest import Resources
from ksa_pipelines.prepare import prepare
from ksa_pipelines.report import Report
from ksa_pipelines.users import told_again
from ksa_pipelines.write import refuse_existing
from recsys_ksa.config_files import parse_config
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.data.manifest import Manifest
from recsys_ksa.data.parts import blocks, checked_parts
from recsys_ksa.errors import DataError
from recsys_ksa.progress import progress


@dataclass(frozen=True)
class Limits:
    """What of a data set is kept; items and users are counted until nothing changes (a core)."""

    k_core: int = 0
    """Every item and every user that is kept has at least so many events that are kept."""
    max_user_events: int | None = None
    """The newest events of a user that are kept."""
    max_item_events: int | None = None
    """The newest events of an item that are kept, of all users; those of one second stay or go together."""
    bots: BotRule | None = None
    """Whom to leave out; None: nobody."""


def view(
    dataset: Path,
    target: Path,
    limits: Limits,
    report: Report,
    resources: Resources = Resources(),  # noqa: B008  frozen
) -> Manifest:
    """Write what `limits` keeps of a data set as a new one, and return its manifest. Items and users count anew.

    Both caps count all events of the data set; the core is taken of what they and the bots leave.

    Raises:
        DataError: nothing is left, `target` exists, or the data set is damaged.
    """
    refuse_existing(target)
    source = open_dataset(dataset)
    config = parse_config(PrepareConfig, source.manifest.config, str(dataset))
    columns = ColumnsConfig(value="value" if source.manifest.has_value else None)
    plain = {"read": ReadConfig(), "columns": columns, "tie": source.manifest.tie, "k_core": limits.k_core}
    plain |= {"min_item_count": 0, "min_user_events": 0}
    config = config.model_copy(update=plain)
    vectors = {name: (name,) for name in config.items.vectors}
    items_columns = config.items.model_copy(update={"item_id": "item_id", "title": "title", "vectors": vectors})
    if source.items.title is None:
        items_columns = items_columns.model_copy(update={"title": ""})
    users_columns = config.users.model_copy(update={"user_id": "user_id"})
    config = config.model_copy(update={"items": items_columns, "users": users_columns})
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as folder:
        log, items = Path(folder) / "log", Path(folder) / "items.parquet"
        log.mkdir()
        for number, frame in enumerate(_kept_events(source, limits, report)):
            pq.write_table(to_arrow(frame), log / f"part-{number:06d}.parquet")
        _items_file(source).write_parquet(items)
        users = None
        if source.manifest.user_features:
            users = str(Path(folder) / "users.parquet")
            told_again(dataset, source.manifest).write_parquet(users)
        try:
            return prepare(str(log), target, config, str(items), report, resources, users)
        except NothingLeftError as error:
            raise DataError(
                f"{dataset}: expected that the view keeps an event, none is left: {error.why}. Ask for less."
            ) from error


def _kept_events(source: Dataset, limits: Limits, report: Report) -> Iterator[pl.DataFrame]:
    """Yield the events as a log, users by index, each user's in order, a block of users at a time."""
    names = pl.Series(source.items.item_id, dtype=pl.String)
    types = pl.Series(source.vocab.get("event_type", [None]), dtype=pl.String)
    since = _item_cap(source, limits.max_item_events)
    num_bots = num_cut = num_capped = 0
    for block in progress(blocks(checked_parts(source.path, source.manifest)), "choosing events", unit="block"):
        if limits.bots is not None:
            lists = block.column("item_index").combine_chunks()
            times = block.column("timestamp").combine_chunks()
            offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
            bots = find_bots(lists.flatten().to_numpy(), times.flatten().to_numpy(), offsets, limits.bots)
            num_bots += int(bots.sum())
            block = block.filter(pl.Series(~bots).to_arrow())
        users = pl.DataFrame(block.select(["user_index", "user_id"]))
        events = as_events(block).join(users, on="user_index", how="left", maintain_order="left")
        height = events.height
        if limits.max_user_events is not None:
            events = events.filter(pl.int_range(pl.len()).reverse().over("user_index") < limits.max_user_events)
        num_cut, height = num_cut + height - events.height, events.height
        if since is not None:
            events = events.filter(pl.Series(events["timestamp"].to_numpy() >= since[events["item_index"].to_numpy()]))
        num_capped += height - events.height
        columns = [pl.col("user_id"), names.gather(events["item_index"]).alias("item_id"), pl.col("timestamp")]
        if "event_type" in events.columns:
            columns.append(types.gather(events["event_type"].cast(pl.UInt32)).alias("event_type"))
        if "event_id" in events.columns:
            columns.append(pl.col("event_id"))
        if "value" in events.columns:
            columns.append(pl.col("value"))
        yield events.select(columns)
    report(f"left out {num_bots:,} bots, {num_cut:,} older events of users and {num_capped:,} of items")


def _item_cap(source: Dataset, most: int | None) -> NDArray[np.int64] | None:
    histories = source.histories
    if most is None:
        return None
    return capped_since(histories.item_index, histories.timestamp, source.num_items, most)


def _items_file(source: Dataset) -> pl.DataFrame:
    columns = {"item_id": pl.Series(source.items.item_id, dtype=pl.String)}
    for name, index in source.items.side.items():
        columns[name] = pl.Series(source.vocab[name], dtype=pl.String).gather(index)
    for name, found in source.items.multi.items():
        values = pl.Series(source.vocab[name], dtype=pl.String).gather(found.index)
        columns[name] = pl.Series(pa.LargeListArray.from_arrays(found.offsets, to_arrow(values)))
    for name, vectors in source.items.vectors.items():
        columns[name] = pl.Series(vectors).arr.to_list()
    if source.items.title is not None:
        columns["title"] = pl.Series(source.items.title, dtype=pl.String)
    return pl.DataFrame(columns).drop_nulls("item_id")
