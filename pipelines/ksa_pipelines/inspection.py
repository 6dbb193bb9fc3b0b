"""What a data set looks like: the figures of `ksa inspect`, read from the mapped cache without loading it whole."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ksa_pipelines.bots import BotRule, find_bots
from recsys_ksa.data.dataset import Dataset
from recsys_ksa.features import NUM_GAP_BUCKETS, history_gap_buckets
from recsys_ksa.progress import progress

SESSION_PAUSE = 30 * 60
"""Seconds without an event that end a session."""
DAY = 86_400
BLOCK = 1 << 20
"""Events looked at at a time, about."""


@dataclass
class Inspection:
    """Figures of a data set; counts over all events unless said."""

    lengths: NDArray[np.int64]
    """Events of each user."""
    item_counts: NDArray[np.int64]
    """Events of each item, largest first."""
    days: Counter[int] = field(default_factory=Counter)
    """Events by day of the clock."""
    gaps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_GAP_BUCKETS, dtype=np.int64))
    """Events by gap bucket; 0: a user's first."""
    gap_0: int = 0
    """Events at the time of the one before."""
    repeats: int = 0
    """Events of an item that the user has met before."""
    distances: Counter[int] = field(default_factory=Counter)
    """Repeats by how many events ago the item was last met, as floor(log2)."""
    sessions: Counter[int] = field(default_factory=Counter)
    """Sessions by number of events, as floor(log2)."""
    event_types: Counter[str] = field(default_factory=Counter)
    bots: list[str] = field(default_factory=list)
    """The users that the bot rule finds."""
    split: dict[str, int] = field(default_factory=dict)
    """Events by protocol and part."""
    warnings: list[str] = field(default_factory=list)
    """What a figure on this data could be fooled by."""


def inspect(dataset: Dataset) -> Inspection:
    """Count a data set, a block of users at a time."""
    histories = dataset.histories
    found = Inspection(histories.lengths, np.sort(dataset.items.count[1:])[::-1])
    for first, last in progress(_blocks(histories.offsets), "looking at events", unit="block"):
        _count_users(found, dataset, first, last)
    _count_split(found, dataset)
    _warn(found, dataset)
    return found


def _blocks(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield users first..last-1 of about `BLOCK` events, and at least one. [U + 1]."""
    first, num_users = 0, len(offsets) - 1
    while first < num_users:
        last = int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1
        last = min(max(last, first + 1), num_users)
        yield first, last
        first = last


def rejected_rows(dataset: Dataset) -> dict[str, int]:
    """Return the rows that were rejected, by reason, of all logs."""
    total: Counter[str] = Counter()
    for log in dataset.manifest.logs:
        total.update(log.rejected)
        total.update({f"duplicate: {reason}": count for reason, count in log.duplicates.items()})
        total.update({f"filter: {reason}": count for reason, count in log.filtered.items()})
    return dict(total.most_common())


def quarantined(path: Path) -> pl.DataFrame:
    """Return a few rejected rows of a data set with their reasons."""
    files = sorted((path / "quarantine").glob("*.parquet"))
    frames = [pl.read_parquet(file, n_rows=5) for file in files]
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


def _count_users(found: Inspection, dataset: Dataset, first: int, last: int) -> None:
    histories = dataset.histories
    rows = slice(int(histories.offsets[first]), int(histories.offsets[last]))
    offsets = histories.offsets[first : last + 1] - histories.offsets[first]
    item, timestamp = histories.item_index[rows], histories.timestamp[rows]
    user = np.repeat(np.arange(last - first), np.diff(offsets))
    _add(found.days, timestamp // DAY)
    found.gaps += np.bincount(history_gap_buckets(timestamp, offsets), minlength=NUM_GAP_BUCKETS)
    same = user[1:] == user[:-1]
    gap = np.diff(timestamp)
    found.gap_0 += int((same & (gap == 0)).sum())
    opens = np.append(True, ~same | (gap >= SESSION_PAUSE))
    _add(found.sessions, _log2(np.diff(np.append(np.flatnonzero(opens), len(user)))))
    by_item = np.lexsort((np.arange(len(item)), item, user))
    again = (user[by_item][1:] == user[by_item][:-1]) & (item[by_item][1:] == item[by_item][:-1])
    found.repeats += int(again.sum())
    _add(found.distances, _log2(np.diff(by_item)[again]))
    bots = np.flatnonzero(find_bots(item, timestamp, offsets, BotRule()))
    found.bots += [histories.user_id[int(first + row)].as_py() for row in bots]
    if histories.event_type is not None:
        kinds, counts = np.unique(histories.event_type[rows], return_counts=True)
        for kind, count in zip(kinds, counts):
            found.event_types[str(dataset.vocab["event_type"][kind])] += int(count)


def _count_split(found: Inspection, dataset: Dataset) -> None:
    histories = dataset.histories
    for protocol in ("loo", "global"):
        valid, test = histories.split[f"{protocol}_valid"], histories.split[f"{protocol}_test"]
        found.split[f"{protocol}: training"] = int(valid.sum())
        found.split[f"{protocol}: validation"] = int((test - valid).sum())
        found.split[f"{protocol}: test"] = int((histories.lengths - test).sum())
        found.split[f"{protocol}: users with test events"] = int((test < histories.lengths).sum())


def _warn(found: Inspection, dataset: Dataset) -> None:
    audit, histories = dataset.manifest.tie_audit, dataset.histories
    if audit.is_artefact:
        found.warnings.append(
            f"The source sorts its ties by item id (P(next id > id | tie) = {audit.next_id_greater:.3f}); order inside "
            f"ties is {dataset.manifest.tie}. `loo-classic` would be answered by a rule on ids."
        )
    if audit.tied_target_share > 0.2:
        found.warnings.append(
            f"{audit.tied_target_share:.0%} of last events share their time with the one before: use `loo` or "
            "`global`, which predict from strictly earlier events."
        )
    if "global" in dataset.manifest.split:
        in_test = histories.split["global_test"] < histories.lengths
        new = in_test & (histories.split["global_test"] == 0)
        if in_test.any() and new.sum() > 0.2 * in_test.sum():
            found.warnings.append(f"{new.sum() / in_test.sum():.0%} of the users in test have no earlier event.")
        unseen = dataset.items.first_seen[1:] >= dataset.manifest.split["global"]["test_start"]
        if unseen.mean() > 0.05:
            found.warnings.append(f"{unseen.mean():.0%} of the items are first met in test: no trained model has them.")
        if not in_test.any() or not (histories.split["global_valid"] > 0).any():
            found.warnings.append("The log is shorter than test and validation: `global` has nothing to train on.")
    if dataset.manifest.clock == "unix" and int(histories.timestamp.min()) < 631_152_000:
        found.warnings.append("Some events are before 1990: look at the clock, or say --clock relative.")
    if found.bots:
        found.warnings.append(f"{len(found.bots):,} users look like bots; `ksa view --drop-bots` leaves them out.")


def _log2(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1


def _add(counter: Counter[int], values: NDArray[np.int64]) -> None:
    found, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(found.tolist(), counts.tolist())))
