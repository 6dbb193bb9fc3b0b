"""Training and validation spans, by protocol; nothing that trains or validates is any protocol's test."""

from types import SimpleNamespace

import numpy as np
import pytest

from recsys_ksa.data.spans import training_end, validation_span
from recsys_ksa.errors import ProtocolError


def dataset(clock_has_time: bool = True) -> SimpleNamespace:
    # Users: ordinary; validation part of `global` empty; too short for `loo`; one event; none.
    lengths = np.array([20, 10, 4, 1, 0])
    split = {
        "loo_valid": np.array([16, 6, 4, 1, 0], dtype=np.int32),
        "loo_test": np.array([18, 9, 4, 1, 0], dtype=np.int32),
        "global_valid": np.array([15, 5, 4, 0, 0], dtype=np.int32),
        "global_test": np.array([19, 5, 4, 1, 0], dtype=np.int32),
    }
    return SimpleNamespace(
        path="ds",
        manifest=SimpleNamespace(split={"global": {}} if clock_has_time else {}),
        histories=SimpleNamespace(offsets=np.concatenate(([0], lengths.cumsum())), split=split),
    )


@pytest.mark.parametrize(
    ("split", "start", "end"),
    [
        ("loo", [16, 6, 4, 1, 0], [18, 9, 4, 1, 0]),
        ("loo-classic", [18, 8, 2, 0, 0], [19, 9, 3, 0, 0]),
        ("global", [15, 5, 4, 0, 0], [19, 5, 4, 1, 0]),
        ("any", [15, 5, 2, 0, 0], [18, 5, 3, 0, 0]),
    ],
)
def test_spans(split: str, start: list[int], end: list[int]) -> None:
    found = validation_span(dataset(), split)  # pyright: ignore
    assert [part.tolist() for part in found] == [start, end]
    assert training_end(dataset(), split).tolist() == start  # pyright: ignore


def test_an_order_without_times_has_no_global_span() -> None:
    start, end = validation_span(dataset(False), "any")  # pyright: ignore
    assert (start.tolist(), end.tolist()) == ([16, 6, 2, 0, 0], [18, 9, 3, 0, 0])
    with pytest.raises(ProtocolError, match=r"data\.split global: expected a data set with times"):
        training_end(dataset(False), "global")  # pyright: ignore
