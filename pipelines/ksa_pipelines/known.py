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

    def in_codes_of(self, names: dict[str, Names], folder: Path) -> tuple[Known, NDArray[np.int32]]:
        """Return the names in the codes of a log, and the number of each of its items, 0 where that is not known.

        A table goes into `folder`.
        """
        codes = find_texts(to_arrow(self.item_ids), names["item"].values).astype(np.int32)
        met = np.flatnonzero(codes >= 0)
        item_index = np.full(names["item"].count, UNKNOWN_ITEM, dtype=np.int32)
        item_index[codes[met]] = met
        codes[codes < 0] = NOT_IN_LOG
        items, types = folder / "item_codes", None
        codes.tofile(items)
        if self.event_types is not None:
            there = {name: code for code, name in enumerate(names["event_type"].values)}
            types = (-1, *(there.get(name, NOT_IN_LOG) for name in self.event_types[1:]))
        return Known(items, types), item_index
