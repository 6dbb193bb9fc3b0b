"""Where each protocol's validation and test begin in each history (positions, see `schema.SPLIT_COLUMNS`)."""

import numpy as np
from numpy.typing import NDArray

from ksa_pipelines.config import SplitConfig
from recsys_ksa.data.manifest import Clock
from recsys_ksa.data.parts import count_before

DAY = 86_400
Positions = dict[str, NDArray[np.int32]]
Split = dict[str, dict[str, int]]


def global_cuts(config: SplitConfig, clock: Clock, log_end: int) -> Split:
    """Return the manifest's `split`: the cut times of protocol `global`; nothing with an ordinal clock."""
    if clock == "ordinal":
        return {}
    test_start = log_end - round(config.test_days * DAY)
    valid_start = test_start - round(config.validation_days * DAY)
    return {"global": {"valid_start": valid_start, "test_start": test_start, "log_end": log_end}}


def split_positions(timestamp: NDArray[np.int64], offsets: NDArray[np.int64], split: Split) -> Positions:
    """Return each column of `schema.SPLIT_COLUMNS`.

    `loo`: test is all events at the last timestamp, validation all at the distinct timestamp before it; with fewer
    than 3 distinct timestamps both are the length (the user only trains). `global`: the first event at or after
    the cut.

    Args:
        timestamp: int64 [T], ordered within each user; offsets: int64 [U + 1], every user has an event.
        split: as `global_cuts` returns it.
    """
    lengths = np.diff(offsets)
    loo_valid, loo_test = _last_timestamps(timestamp, offsets)
    positions = {"loo_valid": loo_valid, "loo_test": loo_test}
    cuts = split.get("global")
    for name, cut in (("global_valid", "valid_start"), ("global_test", "test_start")):
        positions[name] = lengths if cuts is None else count_before(timestamp, offsets, cuts[cut])
    return {name: column.astype(np.int32) for name, column in positions.items()}


def _last_timestamps(timestamp: NDArray[np.int64], offsets: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    """Positions of the first event at the last timestamp but one and at the last; lengths where fewer than 3."""
    lengths = np.diff(offsets)
    begins = np.empty(len(timestamp), dtype=bool)
    begins[:1] = True
    begins[1:] = timestamp[1:] != timestamp[:-1]
    begins[offsets[:-1]] = True
    rows = np.flatnonzero(begins)
    ends = np.searchsorted(rows, offsets[1:])
    distinct = np.diff(np.concatenate([[0], ends]))
    trains_only = distinct < 3
    valid = np.where(trains_only, lengths, rows[np.maximum(ends - 2, 0)] - offsets[:-1])
    test = np.where(trains_only, lengths, rows[ends - 1] - offsets[:-1])
    return valid, test
