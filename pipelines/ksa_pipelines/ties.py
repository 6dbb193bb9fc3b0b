"""The audit of a log's ties, and the one order of `recsys_ksa.order` as a sort."""

from dataclasses import dataclass, fields

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ksa_pipelines.arrow import take_rows, to_arrow
from recsys_ksa.data.manifest import ChosenBy, TieAudit
from recsys_ksa.errors import SchemaError
from recsys_ksa.order import TieKind, hash_tie_numbers

MIN_TIED_PAIRS = 1_000


@dataclass(frozen=True)
class TiedPairs:
    """Neighbouring events of users, counted in the log's own order; counts of buckets add up."""

    order: TieKind
    """`id` where the log has event ids, else `arrival`."""
    users: int = 0
    gaps: int = 0
    """Pairs of neighbours."""
    tied: int = 0
    """Pairs of equal times."""
    tied_targets: int = 0
    """Users whose last two events have equal times."""
    pairs: int = 0
    """Tied pairs of different items."""
    greater: int = 0
    """Of these, the second with the larger item id."""

    def __add__(self, other: "TiedPairs") -> "TiedPairs":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.type is int}
        return TiedPairs(order=self.order, **sums)

    def audit(self) -> TieAudit:
        """Return how often neighbours are tied and whether the order inside ties follows the item id."""
        pairs, greater = self.pairs, self.greater
        return TieAudit(
            order=self.order,
            gap_0_share=self.tied / self.gaps if self.gaps else 0.0,
            tied_target_share=self.tied_targets / self.users if self.users else 0.0,
            num_tied_pairs=pairs,
            next_id_greater=greater / pairs if pairs else None,
            is_artefact=pairs >= MIN_TIED_PAIRS and _is_sorted(greater, pairs),
        )


def order_by_time(user: NDArray[np.integer], timestamp: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order of events by (user, timestamp), ties as they were: [T], [T] -> int64 [T].

    Most logs come by time, so that putting users together is all there is to do: one pass for each 16 bits of the
    largest user. Only events of users that are not in order then are sorted.

    Args:
        user: not negative.
        timestamp: of the same events.
    """
    order = np.argsort((user & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, int(user.max(initial=0)).bit_length(), 16):
        order = order[np.argsort((user[order] >> shift & 0xFFFF).astype(np.uint16), kind="stable")]
    user, timestamp = user[order], timestamp[order]
    opens = np.append(True, user[1:] != user[:-1])
    late = ~opens
    late[1:] &= timestamp[1:] < timestamp[:-1]
    if late.any():
        owner = np.cumsum(opens) - 1
        rows = np.flatnonzero((np.bincount(owner[late], minlength=owner[-1] + 1) > 0)[owner])
        order[rows] = order[rows[np.lexsort((timestamp[rows], owner[rows]))]]
    return order


def count_tied_pairs(events: pl.DataFrame, ranks: NDArray[np.int64]) -> TiedPairs:
    """Count neighbours in the log's own order.

    Args:
        events: by (user, timestamp), ties by arrival: user, item, timestamp and, where the log has them, event_id.
        ranks: what item ids are compared by (`names.audit_ranks`), by `item`.
    """
    order: TieKind = "arrival"
    if "event_id" in events.columns:
        order = "id"
        events = events.sort("user", "timestamp", pl.col("event_id").cast(pl.Binary), maintain_order=True)
    user, timestamp, item = (events[name].to_numpy() for name in ("user", "timestamp", "item"))
    same_user = user[1:] == user[:-1]
    tied = same_user & (timestamp[1:] == timestamp[:-1])
    last = np.append(~same_user, True)[1:]
    first, second = (ranks.take(each.compress(tied)) for each in (item[:-1], item[1:]))
    return TiedPairs(
        order=order,
        users=int((~same_user).sum()) + (len(user) > 0),
        gaps=int(same_user.sum()),
        tied=int(tied.sum()),
        tied_targets=int((tied & last).sum()),
        pairs=int((first != second).sum()),
        greater=int((second > first).sum()),
    )


def _is_sorted(greater: int, pairs: int) -> bool:
    """Whether greater / pairs is more than 1/20 from 1/2, in integers so that the edge is exact."""
    return 10 * abs(2 * greater - pairs) > pairs


@dataclass(frozen=True)
class TieChoice:
    """What orders equal timestamps, and why."""

    kind: TieKind
    chosen_by: ChosenBy


def choose_tie(audit: TieAudit, asked: TieKind | None) -> TieChoice:
    """Return what the config asks for, else `hash` where the audit found sorted ties, else the log's own order.

    Raises:
        SchemaError: `id` is asked for and the log has no event ids.
    """
    if asked == "id" and audit.order != "id":
        raise SchemaError("tie 'id': expected a log with event ids, got none. Map event_id, or use arrival or hash.")
    if asked is not None:
        return TieChoice(asked, "config")
    return TieChoice("hash", "audit") if audit.is_artefact else TieChoice(audit.order, "default")


def describe_ties(audit: TieAudit, choice: TieChoice) -> str:
    """Return the audit and the choice as one line."""
    greater = "-" if audit.next_id_greater is None else f"{audit.next_id_greater:.4f}"
    verdict = "the source sorts its ties by item id; " if audit.is_artefact else ""
    return (
        f"ties: {audit.gap_0_share:.1%} of gaps are 0, {audit.tied_target_share:.1%} of last events are tied, "
        f"P(next id > id | tie) = {greater} over {audit.num_tied_pairs:,} pairs: "
        f"{verdict}{choice.kind} order ({choice.chosen_by})"
    )


def sort_by_order(events: pl.DataFrame, kind: TieKind) -> tuple[pl.DataFrame, pa.Array]:
    """Return the events sorted by (user, timestamp, tie), ties after that by arrival, and the ties.

    Args:
        events: user, timestamp, `arrival` (uint64) and, by kind, event_id (nulls fall back to arrival) or
            item_hash (uint64) and event_type_name (string, where the log has types); events of one user and time
            by arrival.
    """
    user, timestamp = events["user"].to_numpy(), events["timestamp"].to_numpy()
    ordered = events if _in_order(user, timestamp) else take_rows(events, order_by_time(user, timestamp))
    keys = {"id": _id_keys, "arrival": _arrival_keys, "hash": _hash_keys}[kind](ordered)
    if keys:
        ordered = ordered.with_columns(**{f"tie_{n}": key for n, key in enumerate(keys)})
        ordered = take_rows(ordered, _tied_order(ordered, len(keys)))
    return ordered.drop(f"tie_{n}" for n in range(len(keys))), _ties(ordered, kind)


def _in_order(user: NDArray[np.integer], timestamp: NDArray[np.int64]) -> bool:
    later = (user[1:] > user[:-1]) | ((user[1:] == user[:-1]) & (timestamp[1:] >= timestamp[:-1]))
    return bool(later.all())


def _tied_order(events: pl.DataFrame, num_keys: int) -> NDArray[np.int64]:
    """Return the order of all rows, events of one user and time by their tie keys; only these are sorted."""
    user, timestamp = events["user"].to_numpy(), events["timestamp"].to_numpy()
    same = np.append(False, (user[1:] == user[:-1]) & (timestamp[1:] == timestamp[:-1]))
    rows = np.flatnonzero(same | np.append(same[1:], False))
    keys = [f"tie_{n}" for n in range(num_keys)]
    run = pl.Series("run", np.cumsum(~same)[rows])
    tied = events.select(keys)[rows].with_columns(run, at=pl.Series(rows, dtype=pl.Int64))
    order = np.arange(events.height)
    order[rows] = tied.sort("run", *keys, maintain_order=True, nulls_last=False)["at"].to_numpy()
    return order


def _arrival_keys(events: pl.DataFrame) -> list[pl.Series]:
    return []


def _hash_keys(events: pl.DataFrame) -> list[pl.Series]:
    with np.errstate(over="ignore"):
        numbers = hash_tie_numbers(events["timestamp"].to_numpy(), events["item_hash"].to_numpy())
    keys = [pl.Series(numbers)]
    if "event_type_name" in events.columns:
        keys.append(events["event_type_name"].fill_null("").cast(pl.Binary))
    return keys


def _id_keys(events: pl.DataFrame) -> list[pl.Series]:
    ids = events["event_id"].cast(pl.Binary)
    if ids.null_count():
        arrivals = pl.Series(pl.from_arrow(_big_endian(events["arrival"])))
        ids = pl.select(pl.coalesce(pl.lit(ids), pl.lit(arrivals))).to_series()
    return [ids]


def _ties(ordered: pl.DataFrame, kind: TieKind) -> pa.Array:
    if kind == "arrival":
        return _big_endian(ordered["arrival"])
    if kind == "id" or "tie_1" not in ordered.columns:
        first = ordered["tie_0"]
        return to_arrow(first) if first.dtype == pl.Binary else _big_endian(first)
    parts = [_big_endian(ordered["tie_0"]), to_arrow(ordered["tie_1"]), pa.scalar(b"", pa.large_binary())]
    return pc.call_function("binary_join_element_wise", parts)


def _big_endian(numbers: pl.Series) -> pa.Array:
    """uint64 numbers -> their 8 big-endian bytes each, large_binary; `recsys_ksa.order.number_tie` for a column."""
    raw = numbers.to_numpy().astype(">u8").tobytes()
    offsets = np.arange(len(numbers) + 1, dtype=np.int64) * 8
    return pa.Array.from_buffers(pa.large_binary(), len(numbers), [None, pa.py_buffer(offsets), pa.py_buffer(raw)])
