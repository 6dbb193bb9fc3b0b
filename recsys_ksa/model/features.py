"""What the network must know of a data set: table sizes and each item's side features. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Clock = Literal["unix", "relative", "ordinal"]


@dataclass(frozen=True)
class SideFeature:
    """One categorical column of the items.

    num_categories: rows of its vocabulary, 0 (unknown) included.
    category: int32 [num_items], the category of each item row.
    """

    num_categories: int
    category: NDArray[np.int32]


@dataclass(frozen=True)
class FeatureSchema:
    """Sizes of every embedding table and the clock of the timestamps.

    num_items: item rows, row 0 (unknown) included.
    num_event_types: rows of the event type vocabulary, 0 where events have no type.
    side: the side features used, by name.
    """

    num_items: int
    num_event_types: int = 0
    side: Mapping[str, SideFeature] = field(default_factory=dict)
    clock: Clock = "unix"

    def as_dict(self) -> dict[str, object]:
        """Return the schema without the items' columns, for run.json and fingerprints."""
        return {
            "num_items": self.num_items,
            "num_event_types": self.num_event_types,
            "side": {name: feature.num_categories for name, feature in self.side.items()},
            "clock": self.clock,
        }
