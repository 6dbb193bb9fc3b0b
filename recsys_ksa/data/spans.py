"""Which part of each history trains and which part validates, by protocol. Nothing here reads an event.

| data.split    | trains on events before        | validates on events from there to before |
|---------------|--------------------------------|------------------------------------------|
| `loo`         | the validation timestamp       | the test timestamp                       |
| `loo-classic` | the last event but one         | the last event                           |
| `global`      | the validation cut             | the test cut                             |
| `any`         | the earliest of those          | the earliest test event of any of them   |

Under `any` a user whose validation part would reach into some protocol's test part does not validate.
"""

from typing import TYPE_CHECKING

import numpy as np

from recsys_ksa.config import TrainingSpan
from recsys_ksa.data.jagged_arrays import Ints
from recsys_ksa.errors import ProtocolError

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset


def validation_span(dataset: "Dataset", split: TrainingSpan) -> tuple[Ints, Ints]:
    """Return where each user's validation events begin, which ends the training span, and where they end. [U], [U].

    Raises:
        ProtocolError: `global` of a data set without time.
    """
    starts, ends = zip(*(_protocol_span(dataset, protocol) for protocol in _protocols(dataset, split)))
    start, end = np.minimum.reduce(starts), np.minimum.reduce(ends)
    return start, np.maximum(start, end)


def training_end(dataset: "Dataset", split: TrainingSpan) -> Ints:
    """Return how many events of each history, from its first, may be trained on. int64 [U]."""
    return validation_span(dataset, split)[0]


def _protocols(dataset: "Dataset", split: TrainingSpan) -> tuple[str, ...]:
    has_time = "global" in dataset.manifest.split
    if split == "any":
        return ("loo", "loo-classic", "global") if has_time else ("loo", "loo-classic")
    if split == "global" and not has_time:
        raise ProtocolError(
            f"data.split global: expected a data set with times, {dataset.path} has only an order. "
            "Set data.split to loo or any."
        )
    return (split,)


def _protocol_span(dataset: "Dataset", protocol: str) -> tuple[Ints, Ints]:
    histories = dataset.histories
    if protocol == "loo-classic":
        length = np.diff(np.asarray(histories.offsets))
        return np.maximum(length - 2, 0), np.maximum(length - 1, 0)
    return (
        np.asarray(histories.split[f"{protocol}_valid"], dtype=np.int64),
        np.asarray(histories.split[f"{protocol}_test"], dtype=np.int64),
    )
