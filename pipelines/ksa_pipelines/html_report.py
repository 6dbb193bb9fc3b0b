"""`Inspection` as one HTML file with its plots inside."""

import html
import importlib
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ksa_pipelines.inspection import DAY, Inspection, quarantined, rejected_rows
from recsys_ksa.data.dataset import Dataset
from recsys_ksa.errors import MissingPackageError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem .8rem; text-align: left; }
tr:nth-child(odd) { background: #f4f4f4; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots svg { width: 32rem; height: auto; } .warning { border-left: 4px solid #c60; padding-left: .8rem; }
"""


def html_report(dataset: Dataset, found: Inspection) -> str:
    """Return the report: figures, warnings, plots, rejected rows.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    counts, audit, manifest = dataset.manifest.counts, dataset.manifest.tie_audit, dataset.manifest
    events = max(counts.events, 1)
    gaps = max(counts.events - counts.users, 1)
    facts = {
        "users": f"{counts.users:,}",
        "items": f"{counts.items:,}",
        "events": f"{counts.events:,}",
        "history, shortest / median / longest": (
            f"{counts.shortest_history:,} / {counts.median_history:,.0f} / {counts.longest_history:,}"
        ),
        "days": f"{max(found.days) - min(found.days) + 1:,}",
        "events of an item the user has met": f"{found.repeats / events:.1%}",
        "gaps of 0 seconds": f"{found.gap_0 / gaps:.1%}",
        "sessions (30 minutes)": f"{sum(found.sessions.values()):,}",
        "users that look like bots": f"{len(found.bots):,}",
        "order of ties": f"{manifest.tie} ({manifest.tie_chosen_by})",
        "P(next id > id | tie)": "-" if audit.next_id_greater is None else f"{audit.next_id_greater:.4f}",
        "clock": manifest.clock,
        "version": f"{manifest.version} ({len(manifest.logs)} logs)",
        "content hash": manifest.content_hash[:16],
        "split hash": manifest.split_hash[:16],
    }
    warnings = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in found.warnings)
    rejected = _table({reason: f"{count:,}" for reason, count in rejected_rows(dataset).items()}) or "<p>none</p>"
    sample = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(value))}</td>' for value in row)}</tr>"
        for row in quarantined(dataset.path).iter_rows()
    )
    title = html.escape(dataset.path.name)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1>{warnings}{_table(facts)}<div class=plots>{''.join(_plots(found, dataset))}</div>"
        f"<h2>Split</h2>{_table({name: f'{count:,}' for name, count in found.split.items()})}"
        f"<h2>Rows left out</h2>{rejected}<table>{sample}</table></html>\n"
    )


def _table(rows: dict[str, str]) -> str:
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table>{''.join(cells)}</table>" if rows else ""


def _plots(found: Inspection, dataset: Dataset) -> list[str]:
    try:
        figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise MissingPackageError(
            "ksa inspect: expected matplotlib for the plots, not installed. Run `pip install recsys-ksa[evaluate]`."
        ) from error

    def plot(title: str, x_label: str, y_label: str, draw: Callable[[Any], object]) -> str:
        figure = figure_class(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
        return text[text.index("<svg") :]

    def powers(counts: Counter[int]) -> Callable[[Any], object]:
        return lambda axes: axes.bar([f"{2**power:,}" for power in sorted(counts)], [counts[p] for p in sorted(counts)])

    def lengths(axes: Any) -> None:
        top = max(int(found.lengths.max()), 2)
        axes.hist(found.lengths, bins=np.unique(np.geomspace(1, top + 1, 40).astype(np.int64)))
        axes.set(xscale="log", yscale="log")

    def days(axes: Any) -> None:
        names = np.array(sorted(found.days))
        values = np.array([found.days[day] for day in names.tolist()])
        axes.plot(names.astype("datetime64[D]") if dataset.manifest.clock == "unix" else names, values)
        axes.tick_params(axis="x", rotation=30)

    def popularity(axes: Any) -> None:
        axes.plot(np.arange(1, len(found.item_counts) + 1), found.item_counts)
        axes.set(xscale="log", yscale="log")

    def gaps(axes: Any) -> None:
        last = int(np.flatnonzero(found.gaps).max()) + 1
        axes.bar(["first", *(f"2^{power}" for power in range(last - 1))], found.gaps[:last])
        axes.tick_params(axis="x", rotation=90)

    return [
        plot("Histories by length", "events", "users", lengths),
        plot(f"Events by day ({DAY:,} s)", "day", "events", days),
        plot("Popularity", "item, by rank", "events", popularity),
        plot("Seconds since the event before", "at least", "events", gaps),
        plot("Repeats: events since the item was last met", "at least", "events", powers(found.distances)),
        plot("Sessions by length", "events, at least", "sessions", powers(found.sessions)),
    ]
