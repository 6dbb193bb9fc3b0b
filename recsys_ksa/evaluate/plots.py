"""The plots of an evaluation, as PNG."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recsys_ksa.evaluate.painting import painted
from recsys_ksa.evaluate.protocol import usefulness
from recsys_ksa.evaluate.rows import MAIN, Row
from recsys_ksa.model.state import full_kv_bytes, kv_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from recsys_ksa.data.dataset import Dataset
    from recsys_ksa.evaluate.evaluation import Evaluation, NamedRun

METRIC = "ndcg@10"
RUN_COLOR, BASELINE_COLOR = "#2a6f97", "#b0b0b0"


def draw(evaluation: "Evaluation", dataset: "Dataset", main: "NamedRun", curves: Path, out: Path) -> list[Path]:
    """Write the plots into `out`; return their paths.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    rows = [row for row in evaluation.rows if row.metric == METRIC and not row.model.startswith(f"{MAIN}-minus-")]
    told = usefulness(evaluation.variants)
    written = [
        _save(out / "models.png", lambda axes: _models(axes, rows, told)),
        _save(out / "history-length.png", lambda axes: _by_length(axes, rows, told, main)),
        _save(out / "request-time.png", lambda axes: _by_request_time(axes, rows, evaluation.variants)),
        _save(out / "state.png", lambda axes: _state(axes, dataset, main)),
    ]
    points = read_curves(curves)
    if points:
        written.append(_save(out / "training.png", lambda axes: _training(axes, points)))
    return written


def read_curves(path: Path) -> list[dict[str, float]]:
    """Return the numbers of each line of metrics.jsonl; nothing if there is no such file."""
    if not path.exists():
        return []
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        points.append({key: float(value) for key, value in values.items() if type(value) in (int, float)})
    return points


def _save(path: Path, paint: "Callable[[Axes], None]") -> Path:
    path.write_bytes(painted(paint, "png"))
    return path


def _models(axes: "Axes", rows: Sequence[Row], told: str) -> None:
    chosen = [row for row in rows if row.slice == "all" and row.request_time in (None, told)]
    chosen.sort(key=lambda row: row.value)
    place = np.arange(len(chosen))
    value = np.array([row.value for row in chosen])
    reach = np.array([[row.value - row.low for row in chosen], [row.high - row.value for row in chosen]])
    colors = [BASELINE_COLOR if row.request_time is None else RUN_COLOR for row in chosen]
    axes.barh(place, value, xerr=np.maximum(reach, 0.0), color=colors, capsize=3)
    axes.set_yticks(place, [row.model for row in chosen])
    axes.set_xlabel(f"{METRIC}, all targets, 95% interval (runs: request time {told})")


def _by_length(axes: "Axes", rows: Sequence[Row], told: str, main: "NamedRun") -> None:
    parts = list(dict.fromkeys(row.slice for row in rows if row.slice.startswith("length-")))
    for model in dict.fromkeys(row.model for row in rows):
        found = {row.slice: row for row in rows if row.model == model and row.request_time in (None, told)}
        line = [found[part] for part in parts]
        is_run = line[0].request_time is not None
        axes.plot(range(len(parts)), [row.value for row in line], marker="o", lw=2 if is_run else 1, label=model)
        if model == MAIN:
            axes.fill_between(range(len(parts)), [row.low for row in line], [row.high for row in line], alpha=0.15)
    axes.set_xticks(range(len(parts)), [part.removeprefix("length-") for part in parts])
    axes.set_xlabel(f"events known (longest trained history: {main.run.info.longest_trained_history:,})")
    axes.set_ylabel(METRIC)
    axes.legend(fontsize=7)


def _by_request_time(axes: "Axes", rows: Sequence[Row], variants: Sequence[str]) -> None:
    chosen = {(row.model, row.request_time): row for row in rows if row.slice == "all" and row.request_time is not None}
    models = [model for model in dict.fromkeys(model for model, _ in chosen) if (model, variants[0]) in chosen]
    for at, model in enumerate(models):
        line = [chosen[(model, variant)] for variant in variants]  # type: ignore[index]
        place = np.arange(len(variants)) + 0.08 * (at - len(models) / 2)
        value = np.array([row.value for row in line])
        reach = np.array([[row.value - row.low for row in line], [row.high - row.value for row in line]])
        axes.errorbar(place, value, yerr=np.maximum(reach, 0.0), fmt="o", capsize=3, label=model)
    axes.set_xticks(range(len(variants)), list(variants))
    axes.set_xlabel("request time shown to the model")
    axes.set_ylabel(f"{METRIC}, all targets")
    axes.legend(fontsize=7)


def _state(axes: "Axes", dataset: "Dataset", main: "NamedRun") -> None:
    config = main.run.config.model
    lengths = dataset.histories.lengths
    length = np.unique(np.geomspace(1, max(int(lengths.max()), 2), 200).astype(np.int64))
    axes.plot(length, [kv_bytes(config, int(n)) / 1e3 for n in length], color=RUN_COLOR, label=main.name)
    axes.plot(length, [full_kv_bytes(config, int(n)) / 1e3 for n in length], color="black", label="full attention")
    axes.axvline(float(np.median(lengths)), color=BASELINE_COLOR, ls="--", label="median history")
    axes.set_xlabel("events")
    axes.set_ylabel("K/V of one user, KB (float32)")
    axes.legend()


def _training(axes: "Axes", points: Sequence[dict[str, float]]) -> None:
    names = [name for name in dict.fromkeys(name for point in points for name in point) if _is_curve(name)]
    other = axes.twinx()
    for at, name in enumerate(names):
        line = [(point["step"], point[name]) for point in points if name in point and "step" in point]
        target = other if "ndcg" in name else axes
        target.plot(*zip(*line), marker="o" if "ndcg" in name else "", lw=1, label=name, color=f"C{at}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    other.set_ylabel(METRIC)
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize=7)


def _is_curve(name: str) -> bool:
    return "loss" in name or "ndcg" in name
