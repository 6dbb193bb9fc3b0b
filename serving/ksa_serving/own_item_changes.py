"""What an item's score loses where the user's own counts lack a chunk of the history."""

from collections.abc import Sequence

import numpy as np

from ksa_serving.events import Meeting
from recsys_ksa.model.seen import SeenItems
from recsys_ksa.model.state import UserState
from recsys_ksa.recommender import Recommender


def own_item_changes(
    recommender: Recommender, state: UserState, item_index: int, met: Sequence[Meeting], request_time: int | None
) -> dict[int, float]:
    """Return for each chunk that has the item what its score loses without that chunk's meetings.

    Args:
        met: the events of the item, in the history's order.
        request_time: Unix seconds; None means none.
    """
    if not met:
        return {}
    place, time = np.array(met, dtype=np.int64).T
    chunk, start, count = np.unique(
        place // recommender.network.config.chunk_size, return_index=True, return_counts=True
    )
    # A chunk's meetings follow each other: what is left are those before `start` and those from `end` on.
    end, total = start + count, len(met)
    first = np.where(start > 0, time[0], time[np.minimum(end, total - 1)])
    last = np.where(end < total, time[-1], time[np.maximum(start - 1, 0)])
    left = SeenItems(
        item_index=np.full(len(chunk) + 1, item_index, np.int32),
        count=np.append(np.maximum(total - count, 1), total).astype(np.int32),
        first=np.append(first, time[0]),
        last=np.append(np.maximum(first, last), time[-1]),
    )
    *gains, whole = recommender.own_gains(state, left, request_time).astype(np.float64)
    gains = np.where(count < total, gains, 0.0)  # without any meeting it is no own item
    return dict(zip(chunk.tolist(), (whole - gains).tolist()))
