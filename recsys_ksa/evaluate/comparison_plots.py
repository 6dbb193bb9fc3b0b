"""The plots of a comparison, as SVG."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recsys_ksa.evaluate.comparison import METRIC, Comparison
from recsys_ksa.evaluate.painting import painted
from recsys_ksa.evaluate.protocol import REQUEST_TIMES
from recsys_ksa.evaluate.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST_OTHERS = 3
"""Models that are no runs, the best ones, drawn beside the runs."""


def draw(comparison: Comparison, curves: dict[str, list[dict[str, float]]]) -> dict[str, bytes]:
    """Return the plots of one protocol as SVG, by title; those with nothing to show are left out.

    Args:
        comparison: of one protocol.
        curves: rows of each run's metrics.jsonl, by label.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    told = f"request time {comparison.told}"
    wanted: list[tuple[str, bool, Callable[[Axes], None]]] = [
        (f"{METRIC} of all models, 95% intervals ({told})", True, lambda axes: _models(axes, comparison)),
        *(
            (
                f"{METRIC} by {words} ({told})",
                len(_parts(comparison, prefix)) > 1,
                lambda axes, prefix=prefix, words=words: _by_slice(axes, comparison, prefix, words),
            )
            for prefix, words in (("length-", "events known"), ("distance-", "where the target was last met"))
        ),
        (
            f"{METRIC} by what is told of the request time",
            len(_variants(comparison)) > 1,
            lambda axes: _by_request_time(axes, comparison),
        ),
        (
            f"K/V of the median history against {METRIC} ({told})",
            any(run.state_bytes_median for run in comparison.runs.values()),
            lambda axes: _state(axes, comparison),
        ),
        ("Training: validation NDCG@10 by step", bool(_validations(curves)), lambda axes: _training(axes, curves)),
    ]
    return {title: painted(paint, "svg") for title, shown, paint in wanted if shown}


def _drawn(comparison: Comparison) -> list[str]:
    """Return the models whose lines are drawn: all with a request time, and the best of the others."""
    models = comparison.models()
    others = [row.model for row in models if row.request_time is None][:BEST_OTHERS]
    return [row.model for row in models if row.request_time is not None] + others


def _models(axes: "Axes", comparison: Comparison) -> None:
    rows = comparison.models()[::-1]
    place = np.arange(len(rows))
    colors = ["#2a6f97" if row.model in comparison.runs else "#b0b0b0" for row in rows]
    axes.barh(place, [row.value for row in rows], xerr=_reach(rows), color=colors, capsize=2)
    axes.set_yticks(place, [row.model for row in rows], fontsize=7)
    axes.set_xlabel(METRIC)


def _parts(comparison: Comparison, prefix: str) -> list[str]:
    return list(dict.fromkeys(row.slice for row in comparison.rows if row.slice.startswith(prefix)))


def _by_slice(axes: "Axes", comparison: Comparison, prefix: str, words: str) -> None:
    parts = _parts(comparison, prefix)
    for model in _drawn(comparison):
        found = {
            row.slice: row
            for row in comparison.rows
            if row.model == model and row.metric == METRIC and row.request_time in (None, comparison.told)
        }
        at = [number for number, part in enumerate(parts) if part in found]
        line = [found[parts[number]] for number in at]
        is_run = model in comparison.runs
        axes.errorbar(at, [row.value for row in line], yerr=_reach(line), marker="o", ms=3, capsize=2,
                      lw=1.8 if is_run else 0.9, ls="-" if is_run else "--", label=model)  # fmt: skip
    count = {row.slice: row.num_users for row in comparison.rows}
    axes.set_xticks(
        range(len(parts)), [f"{part.removeprefix(prefix)}\n{count[part]:,} users" for part in parts], fontsize=7
    )
    axes.set_xlabel(words)
    axes.set_ylabel(METRIC)
    axes.legend(fontsize=6, ncols=2)


def _variants(comparison: Comparison) -> list[str]:
    told = {row.request_time for row in comparison.rows}
    return [variant for variant in REQUEST_TIMES if variant in told]


def _by_request_time(axes: "Axes", comparison: Comparison) -> None:
    variants = _variants(comparison)
    for model in comparison.runs:
        found = {
            row.request_time: row
            for row in comparison.rows
            if row.model == model and row.slice == "all" and row.metric == METRIC
        }
        at = [number for number, variant in enumerate(variants) if variant in found]
        line = [found[variants[number]] for number in at]  # type: ignore[index]
        axes.errorbar(at, [row.value for row in line], yerr=_reach(line), marker="o", capsize=3, label=model)
    axes.set_xticks(range(len(variants)), variants)
    axes.set_ylabel(METRIC)
    axes.legend(fontsize=7)


def _state(axes: "Axes", comparison: Comparison) -> None:
    value = {row.model: row for row in comparison.models()}
    for label, run in comparison.runs.items():
        if run.state_bytes_median is not None and label in value:
            row = value[label]
            axes.errorbar(run.state_bytes_median / 1e3, row.value, yerr=_reach([row]), marker="o", capsize=3)
            axes.annotate(label, (run.state_bytes_median / 1e3, row.value), xytext=(5, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel(f"KB of one user's K/V at {comparison.record.median_history:,} events, float32 (log)")
    axes.set_ylabel(METRIC)


def _validations(curves: dict[str, list[dict[str, float]]]) -> dict[str, list[tuple[float, float]]]:
    found = {
        label: [(point["step"], point["valid_ndcg@10"]) for point in points if "valid_ndcg@10" in point]
        for label, points in curves.items()
    }
    return {label: line for label, line in found.items() if line}


def _training(axes: "Axes", curves: dict[str, list[dict[str, float]]]) -> None:
    for label, line in _validations(curves).items():
        axes.plot(*zip(*line), marker="o", ms=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("validation NDCG@10")
    axes.legend(fontsize=7)


def _reach(rows: Sequence[Row]) -> np.ndarray:
    reach = np.array([[row.value - row.low for row in rows], [row.high - row.value for row in rows]])
    return np.maximum(reach, 0.0)
