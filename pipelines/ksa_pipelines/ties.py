"""The audit of a log's ties, and the one order of `recsys_ksa.order` as a sort."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from ksa_pipelines.sources import ROW
from ksa_pipelines.vocab import comparison_ranks
from recsys_ksa.data.manifest import ChosenBy, TieAudit
from recsys_ksa.errors import SchemaError
from recsys_ksa.order import TieKind, hash_tie_numbers

MIN_TIED_PAIRS = 1_000


def neighbours(events: pl.LazyFrame, order: TieKind) -> pl.LazyFrame:
    """Pairs of neighbouring events of a user in the log's own order: `tied`, `other` (items differ), `greater`, `last`.

    Args:
        events: user_id, item_id, timestamp, `ROW` and, for order `id`, event_id.
        order: `arrival` or `id`; decides inside equal timestamps.
    """
    ties = [ROW] if order == "arrival" else [pl.col("event_id").cast(pl.Binary), pl.col(ROW)]
    user = pl.col("user_id").cast(pl.Categorical).to_physical().alias("user")
    ranked = events.join(events.select("item_id").unique().pipe(comparison_ranks), on="item_id", how="left")
    ordered = ranked.with_columns(user).sort("user", "timestamp", *ties).select("user", "timestamp", "rank")
    same_user = pl.col("user") == pl.col("user").shift(1)
    return ordered.select(
        (pl.col("timestamp") == pl.col("timestamp").shift(1)).alias("tied"),
        (pl.col("rank") != pl.col("rank").shift(1)).alias("other"),
        (pl.col("rank") > pl.col("rank").shift(1)).alias("greater"),
        (pl.col("user") != pl.col("user").shift(-1)).fill_null(True).alias("last"),
        same_user.fill_null(False).alias("same_user"),
    ).filter("same_user")


def audit_ties(events: pl.LazyFrame, order: TieKind) -> TieAudit:
    """Measure how often neighbours are tied and whether the order inside ties follows the item id."""
    users = events.select(pl.col("user_id").n_unique().alias("users"))
    pair = pl.col("tied") & pl.col("other")
    totals = neighbours(events, order).select(
        pl.len().alias("gaps"),
        pl.col("tied").sum(),
        (pl.col("tied") & pl.col("last")).sum().alias("tied_targets"),
        pair.sum().alias("pairs"),
        (pair & pl.col("greater")).sum().alias("greater"),
    )
    row = pl.concat([totals, users], how="horizontal").collect().row(0, named=True)
    greater = row["greater"] / row["pairs"] if row["pairs"] else None
    return TieAudit(
        order=order,
        gap_0_share=row["tied"] / row["gaps"] if row["gaps"] else 0.0,
        tied_target_share=row["tied_targets"] / row["users"],
        num_tied_pairs=row["pairs"],
        next_id_greater=greater,
        is_artefact=row["pairs"] >= MIN_TIED_PAIRS and _is_sorted(row["greater"], row["pairs"]),
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


def sort_by_order(events: pl.DataFrame, kind: TieKind) -> pl.DataFrame:
    """Return the events sorted by (user_index, timestamp, tie), ties after that by arrival, with the column `tie`.

    Args:
        events: user_index, timestamp, `arrival` (uint64) and, by kind, event_id (nulls fall back to arrival) or
            item_hash (uint64) and event_type_name (string, where the log has types).
    """
    keys = {"id": _id_keys, "arrival": _arrival_keys, "hash": _hash_keys}[kind](events)
    ordered = events.with_columns(**{f"tie_{n}": key for n, key in enumerate(keys)}).sort(
        "user_index", "timestamp", *(f"tie_{n}" for n in range(len(keys))), "arrival", nulls_last=False
    )
    return ordered.with_columns(tie=_ties(ordered, kind)).drop(f"tie_{n}" for n in range(len(keys)))


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
        ids = pl.select(pl.coalesce(pl.lit(ids), pl.lit(_big_endian(events["arrival"])))).to_series()
    return [ids]


def _ties(ordered: pl.DataFrame, kind: TieKind) -> pl.Series:
    if kind == "arrival":
        return _big_endian(ordered["arrival"])
    if kind == "id" or "tie_1" not in ordered.columns:
        first = ordered["tie_0"]
        return first if first.dtype == pl.Binary else _big_endian(first)
    number, event_type = _big_endian(ordered["tie_0"]).to_arrow(), ordered["tie_1"].to_arrow()
    parts = [number.cast(pa.large_binary()), event_type.cast(pa.large_binary()), pa.scalar(b"", pa.large_binary())]
    joined = pc.call_function("binary_join_element_wise", parts)
    return pl.Series(pl.from_arrow(joined))


def _big_endian(numbers: pl.Series) -> pl.Series:
    """uint64 numbers -> their 8 big-endian bytes each, Binary; `recsys_ksa.order.number_tie` for a column."""
    raw = numbers.to_numpy().astype(">u8").tobytes()
    offsets = np.arange(len(numbers) + 1, dtype=np.int64) * 8
    array = pa.Array.from_buffers(pa.large_binary(), len(numbers), [None, pa.py_buffer(offsets), pa.py_buffer(raw)])
    return pl.Series(pl.from_arrow(array))
