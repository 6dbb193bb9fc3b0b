"""The rows of an evaluation: one figure each, in the form that scripts read (JSON list)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.evaluate.intervals import Bootstrap, Interval
from recsys_ksa.evaluate.protocol import ProtocolName, RequestTime
from recsys_ksa.evaluate.slices import Column

MAIN = "ksa"
"""Name of the run that is evaluated; the others are compared with it."""


@dataclass(frozen=True)
class Row:
    """One figure."""

    model: str
    """`ksa`, a compared run, a baseline; or `ksa-minus-NAME`, a difference paired by user."""
    protocol: ProtocolName
    request_time: RequestTime | None
    """What the model is told; None for what knows of no request time."""
    slice: str
    metric: str
    value: float
    """Mean over users of the user's mean."""
    low: float
    high: float
    """95% interval, bootstrap over users."""
    num_users: int
    """Users with a target in the slice."""


def make_rows(protocol: ProtocolName, columns: Sequence[Column], values: NDArray[np.float64]) -> list[Row]:
    """Return a row for each column, then the paired differences between `ksa` and each other model.

    Args:
        protocol: of the questions.
        columns: C of them.
        values: per-user values, float64 [U, C].
    """
    bootstrap = Bootstrap(values)
    rows = [
        _row(column.model, column.request_time, protocol, column, bootstrap.interval(at))
        for at, column in enumerate(columns)
    ]
    main: dict[tuple[str, str], list[int]] = {}
    for at, column in enumerate(columns):
        if column.model == MAIN:
            main.setdefault((column.slice, column.metric), []).append(at)
    for at, column in enumerate(columns):
        if column.model == MAIN:
            continue
        for main_at in main.get((column.slice, column.metric), []):
            request_time = columns[main_at].request_time
            if column.request_time in (None, request_time):
                difference = bootstrap.difference(main_at, at)
                rows.append(_row(f"{MAIN}-minus-{column.model}", request_time, protocol, column, difference))
    return rows


def _row(model: str, request_time: RequestTime | None, protocol: ProtocolName, column: Column, figure: Interval) -> Row:
    return Row(
        model,
        protocol,
        request_time,
        column.slice,
        column.metric,
        figure.value,
        figure.low,
        figure.high,
        figure.num_users,
    )


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a JSON list, one row a line."""
    lines = ",\n".join(json.dumps(asdict(row), allow_nan=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
