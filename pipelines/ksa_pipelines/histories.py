"""From ordered events to one row a user, in `recsys_ksa.schema.histories_schema`."""

import numpy as np
import polars as pl
import pyarrow as pa

from ksa_pipelines.arrow import to_arrow
from ksa_pipelines.split import Positions
from recsys_ksa.schema import histories_schema

_LISTS = ("item_index", "timestamp", "tie", "event_id", "event_type")


def user_offsets(events: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Events sorted by user_index -> each user's user_index, int64 [U], and offsets, int64 [U + 1]."""
    user = events["user_index"].to_numpy()
    first = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
    return user[first], np.concatenate([first, [len(user)]]).astype(np.int64)


def group_by_user(events: pl.DataFrame, users: pl.DataFrame, split: Positions, offsets: np.ndarray) -> pa.Table:
    """Return one row a user, events in order, users by index.

    Args:
        events: sorted by (user_index, order): item_index, timestamp, tie and, where the log has them, event_id and
            event_type (index).
        users: user_id and user_index, sorted by user_index.
    """
    schema = histories_schema(has_event_type="event_type" in events.columns, has_event_id="event_id" in events.columns)
    bounds = pa.array(offsets, type=pa.int64())
    columns: dict[str, pa.Array] = {
        "user_id": to_arrow(users["user_id"]).cast(pa.string()),
        "user_index": to_arrow(users["user_index"]),
    }
    for name in _LISTS:
        if name in events.columns:
            values = to_arrow(events[name]).cast(schema.field(name).type.value_type)
            columns[name] = pa.LargeListArray.from_arrays(bounds, values)
    columns |= {name: pa.array(positions, type=pa.int32()) for name, positions in split.items()}
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def as_events(histories: pa.Table) -> pl.DataFrame:
    """Return a histories table as one row an event: user_index and the lists, in order."""
    lists = [name for name in _LISTS if name in histories.column_names]
    return pl.DataFrame(histories.select(["user_index", *lists])).explode(lists)
