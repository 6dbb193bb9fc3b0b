"""What a data set already knows, where a log is appended: its histories, and its names in the codes of the log."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ksa_pipelines.arrow import find_texts, to_arrow
from ksa_pipelines.names import Names
from ksa_pipelines.stored import Stored
from recsys_ksa.schema import UNKNOWN_ITEM

NOT_IN_LOG = -2
"""Code of a name that the data set has and the log has not."""


@dataclass(frozen=True)
class Known:
    """Names of a data set, to the buckets of a log."""

    item_codes: Path
    """int32: the log's code of each item, by item_index."""
    event_types: tuple[int, ...] | None
    """The log's code of each event type, by index; None where there are no types."""


@dataclass(frozen=True)
class KnownNames:
    """A data set, before the log's names are known."""

    stored: Stored
    item_ids: pl.Series
    """By item_index."""
    event_types: tuple[str | None, ...] | None
    """By index."""
    columns: frozenset[str]
    """Of the optional ones, event_type and event_id, those it has."""

    def item_index(self, names: Names) -> NDArray[np.int64]:
        """Return the data set's number of each item of a log; 0 where it does not know the item."""
        return np.maximum(find_texts(names.values, to_arrow(self.item_ids)), UNKNOWN_ITEM)

    def in_codes_of(self, names: dict[str, Names], item_index: NDArray[np.int64], folder: Path) -> Known:
        """Return the names in the codes of a log; a table goes into `folder`."""
        items = folder / "item_codes"
        codes = np.full(len(self.item_ids), NOT_IN_LOG, dtype=np.int32)
        met = np.flatnonzero(item_index)
        codes[item_index[met]] = met
        codes.tofile(items)
        if self.event_types is None:
            return Known(items, None)
        there = {name: code for code, name in enumerate(names["event_type"].values)}
        return Known(items, (-1, *(there.get(name, NOT_IN_LOG) for name in self.event_types[1:])))
