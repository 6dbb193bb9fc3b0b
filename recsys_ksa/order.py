"""The one order of a history, used by the pipeline as a sort and by the service as a tuple.

A history is ordered by `(timestamp, tie)`: Unix seconds, then `tie` compared as bytes.
What a tie is depends on the data set's `TieKind`:

- `id`: the event id, as UTF-8;
- `arrival`: a number given at first sight, as 8 big-endian bytes;
- `hash`: `splitmix64(timestamp XOR first 8 bytes of SHA-256(item id))`, as 8 big-endian bytes, then the
  event type as UTF-8. For sources whose ties are sorted by an artefact. No user is in it, so library and
  service need none. Events still equal after that are alike to the model, so a stable sort (arrival) ends it.

Torch-free: numpy and hashlib only.
"""

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TieKind = Literal["id", "arrival", "hash"]
OrderKey = tuple[int, bytes]
"""(timestamp in Unix seconds, tie)."""
_LARGEST = 2**64 - 1


def item_hash(item_id: str) -> int:
    """First 8 bytes, big-endian, of SHA-256 of the item id as UTF-8."""
    return int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:8], "big")


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the splitmix64 finaliser of each value (Steele, Lea, Flood 2014). uint64 [T] -> uint64 [T]."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _splitmix64_of_one(x: int) -> int:
    """Return `splitmix64` of one value, taken modulo 2^64: for few events an array costs more than its numbers."""
    z = (x + 0x9E3779B97F4A7C15) & _LARGEST
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LARGEST
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LARGEST
    return z ^ (z >> 31)


def hash_tie_numbers(timestamp: NDArray[np.int64], item_hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the number whose 8 big-endian bytes begin a `hash` tie. [T], [T] -> uint64 [T]."""
    return splitmix64(np.ascontiguousarray(timestamp, dtype=np.int64).view(np.uint64) ^ item_hashes)


def number_tie(number: int) -> bytes:
    """Return a non-negative number as a tie: 8 big-endian bytes, so that bytes compare as numbers do."""
    return int(number).to_bytes(8, "big")


def order_key(
    kind: TieKind, timestamp: int, item_id: str, *, event_id: str | None, event_type: str | None, arrival: int
) -> OrderKey:
    """Return the key by which one event is ordered among its user's events.

    Args:
        kind: the data set's tie kind.
        timestamp: Unix seconds.
        item_id, event_id, event_type: raw ids; None where the log has none.
        arrival: the number given at first sight; used by kind `arrival`, and by `id` where no id came.
    """
    if kind == "hash":
        return timestamp, number_tie(_splitmix64_of_one(timestamp ^ item_hash(item_id))) + (event_type or "").encode()
    if kind == "id" and event_id is not None:
        return timestamp, event_id.encode()
    return timestamp, number_tie(arrival)
