"""What the network must know of a data set: table sizes and each item's side features. Torch-free."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.data.item_columns import Categories
from recsys_ksa.features import UserFeature

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
class MultiFeature(Categories):
    """One column of the items that holds several categories each.

    num_categories: rows of its vocabulary, 0 (unknown) included.
    """

    num_categories: int


@dataclass(frozen=True)
class FeatureSchema:
    """Sizes of every embedding table and the clock of the timestamps.

    num_items: item rows, row 0 (unknown) included.
    num_event_types: rows of the event type vocabulary, 0 where events have no type.
    side: the side features used that are one category an item, by name.
    multi: those that are several.
    vectors: those that are a vector an item, float32 [num_items, D].
    users: the features of users used, by name.
    """

    num_items: int
    num_event_types: int = 0
    side: Mapping[str, SideFeature] = field(default_factory=dict)
    clock: Clock = "unix"
    multi: Mapping[str, MultiFeature] = field(default_factory=dict)
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    users: Mapping[str, UserFeature] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Return the schema without the items' columns, for run.json and fingerprints."""
        more: dict[str, object] = {}
        if self.multi:
            more["multi"] = {name: feature.num_categories for name, feature in self.multi.items()}
        if self.vectors:
            more["vectors"] = {name: vectors.shape[1] for name, vectors in self.vectors.items()}
        if self.users:
            more["users"] = {name: asdict(feature) for name, feature in self.users.items()}
        return more | {
            "num_items": self.num_items,
            "num_event_types": self.num_event_types,
            "side": {name: feature.num_categories for name, feature in self.side.items()},
            "clock": self.clock,
        }
