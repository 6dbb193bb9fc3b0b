"""New events of users into the histories that are there, by the one order, without sorting what is in order."""

from bisect import bisect_right

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys_ksa.order import TieKind

Lists = dict[str, pa.Array]
Offsets = NDArray[np.int64]


def insert_events(
    old: Lists, old_offsets: Offsets, new: Lists, new_offsets: Offsets, kind: TieKind
) -> tuple[Lists, Offsets]:
    """Return the values of both, users as they are and each user's events in order, and their offsets.

    Equal keys: old ones first.

    Args:
        old, new: the same lists' values, in order within each user: timestamp, tie and others.
        old_offsets, new_offsets: of the same users, int64 [U + 1]; a user can have no old events.
        kind: of the ties; an arrival number is larger than all before.
    """
    places = _places(old, old_offsets, new, new_offsets, by_tie=kind != "arrival")
    lists = {name: _inserted(old[name], new[name], places) for name in old}
    return lists, old_offsets + new_offsets


def _places(old: Lists, old_offsets: Offsets, new: Lists, new_offsets: Offsets, *, by_tie: bool) -> NDArray[np.int64]:
    """Return how many of all old events come before each new one."""
    users = np.arange(len(old_offsets) - 1)
    begins, places = find_times(
        np.repeat(users, np.diff(old_offsets)),
        old["timestamp"].to_numpy(),
        np.repeat(users, np.diff(new_offsets)),
        new["timestamp"].to_numpy(),
    )
    if by_tie:
        for row in np.flatnonzero(begins < places).tolist():
            ties = old["tie"].slice(begins[row], places[row] - begins[row]).to_pylist()
            places[row] = begins[row] + bisect_right(ties, new["tie"][row].as_py())
    return places


def find_times(
    old_user: NDArray[np.integer],
    old_time: NDArray[np.int64],
    new_user: NDArray[np.integer],
    new_time: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where among old events those of a new event's user and time begin and end, int64 [new events] each.

    Args:
        old_user, old_time: of the old events, by user and time; users not negative.
        new_user, new_time: of the new ones, of which there is at least one.
    """
    first = int(min(old_time.min(initial=new_time[0]), new_time.min()))
    span = int(max(old_time.max(initial=new_time[0]), new_time.max())) - first + 1
    num_users = int(max(old_user.max(initial=0), new_user.max())) + 1
    if span * (num_users + 1) >= 1 << 63:  # times from another world: their ranks do as well
        times, ranks = np.unique(np.concatenate([old_time, new_time]), return_inverse=True)
        old_time, new_time, first, span = ranks[: len(old_time)], ranks[len(old_time) :], 0, len(times)
    old_key = old_user.astype(np.int64) * span + (old_time - first)
    new_key = new_user.astype(np.int64) * span + (new_time - first)
    return np.searchsorted(old_key, new_key, side="left"), np.searchsorted(old_key, new_key, side="right")


def _inserted(old: pa.Array, new: pa.Array, places: NDArray[np.int64]) -> pa.Array:
    new = new.cast(old.type)
    if not (pa.types.is_large_binary(old.type) or pa.types.is_large_string(old.type)):
        return pa.array(np.insert(old.to_numpy(), places, new.to_numpy()))
    order = np.insert(np.arange(len(old)), places, len(old) + np.arange(len(new)))
    return pa.concat_arrays([old, new]).take(pa.array(order))
