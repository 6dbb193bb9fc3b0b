"""From ordered events to one row a user, in `recsys_ksa.schema.histories_schema`."""

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.split import Positions
from recsys_ksa.schema import histories_schema

LISTS = ("item_index", "timestamp", "tie", "event_id", "event_type", "value")


def user_offsets(user_index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Users of events, ascending -> each user once, int64 [U], and offsets, int64 [U + 1]."""
    first = np.flatnonzero(np.concatenate([[True], user_index[1:] != user_index[:-1]]))
    return user_index[first], np.concatenate([first, [len(user_index)]]).astype(np.int64)


def group_by_user(
    lists: dict[str, pa.Array], users: pl.DataFrame, split: Positions, offsets: NDArray[np.int64]
) -> pa.Table:
    """Return one row a user, events in order, users by index.

    Args:
        lists: values of all events, by (user_index, order): item_index, timestamp, tie and, where the log has them,
            event_id, event_type (index) and value.
        users: user_id and user_index, sorted by user_index.
        split: positions.
        offsets: int64 [U + 1].
    """
    there = {f"has_{name}": name in lists for name in ("event_type", "event_id", "value")}
    schema = histories_schema(**there)
    bounds = pa.array(offsets)
    columns: dict[str, pa.Array] = {
        "user_id": to_arrow(users["user_id"]).cast(pa.string()),
        "user_index": to_arrow(users["user_index"]),
    }
    for name, values in lists.items():
        columns[name] = pa.LargeListArray.from_arrays(bounds, values.cast(schema.field(name).type.value_type))
    columns |= {name: pa.array(positions, type=pa.int32()) for name, positions in split.items()}
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def lists_of(histories: pa.Table) -> tuple[dict[str, pa.Array], NDArray[np.int64]]:
    """Return the values of a histories table's lists, and their offsets from 0, int64 [U + 1]."""
    columns = {name: histories.column(name).combine_chunks() for name in LISTS if name in histories.schema.names}
    offsets = columns["item_index"].offsets.to_numpy()
    return {name: column.flatten() for name, column in columns.items()}, offsets - offsets[0]


def as_events(histories: pa.Table) -> pl.DataFrame:
    """Return a histories table as one row an event: user_index and the lists, in order."""
    lists = [name for name in LISTS if name in histories.column_names]
    return pl.DataFrame(histories.select(["user_index", *lists])).explode(lists)
