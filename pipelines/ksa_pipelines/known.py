"""What a data set already knows, where a log is appended: its histories, and its names in the codes of the log."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ksa_pipelines.names import Names
from ksa_pipelines.stored import Stored

NOT_IN_LOG = -2
"""Code of a name that the data set has and the log has not."""


@dataclass(frozen=True)
class Known:
    """A data set, to a bucket of a log."""

    stored: Stored
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

    def in_codes_of(self, names: dict[str, Names], folder: Path) -> Known:
        """Return the names in the codes of a log; tables go into `folder`."""
        items = folder / "item_codes"
        _codes(self.item_ids, names["item"]).tofile(items)
        types = None
        if self.event_types is not None:
            codes = _codes(pl.Series(self.event_types, dtype=pl.String), names["event_type"])
            types = (-1, *codes[1:].tolist())
        return Known(self.stored, items, types)


def _codes(values: pl.Series, names: Names) -> np.ndarray:
    codes = pl.DataFrame({"name": names.values, "code": np.arange(names.count, dtype=np.int32)})
    joined = pl.DataFrame({"name": values}).join(codes, on="name", how="left", maintain_order="left")
    return joined["code"].fill_null(NOT_IN_LOG).to_numpy()
