"""A comparison as one Markdown text and as one HTML page that needs nothing beside itself."""

import base64
from collections.abc import Sequence
from html import escape

from recsys_ksa.evaluate.comparison import METRIC, Comparison
from recsys_ksa.evaluate.intervals import FLIPS, RESAMPLES
from recsys_ksa.evaluate.lists import COVERAGE
from recsys_ksa.evaluate.metrics import METRICS
from recsys_ksa.evaluate.report import PROTOCOL_WORDS, table

HEAD = ("model", *METRICS, f'"again" {METRIC}', f'"new for you" {METRIC}', COVERAGE, "KB of state")
SEED_HEAD = ("config", "seeds", METRIC, f'"again" {METRIC}', f'"new for you" {METRIC}')
PAIR_HEAD = ("model", "other", "difference", "p", "p, Holm")
SEED_WORDS = "Over seeds: mean of the runs (lowest to highest)."
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: 13px; color: #555; } img { width: 100%; }
.wide { overflow-x: auto; } li { margin: .15rem 0; }
"""


def facts(comparison: Comparison) -> list[str]:
    """Return what must be known to read the figures."""
    record = comparison.record
    lines = [
        f"{record.num_users:,} users, {record.num_questions:,} questions, {record.num_targets:,} targets "
        f"({record.repeat_share:.1%} repeats), all {record.num_items:,} items ranked, ties against the model; "
        f"seen filter {'on' if record.exclude_seen else 'off'}",
        f"request time: {comparison.told}; a figure is the mean over users of the user's mean, [95% interval of "
        f"{RESAMPLES:,} resamples of users]",
        f"{record.gap_0_share:.1%} of gaps are 0, {record.tied_target_share:.1%} of last events are tied; order inside "
        f"ties: {record.tie}; clock {record.clock}",
        f"data {record.data_hash}, split {record.split_hash}",
    ]
    if record.max_length is not None:
        lines.append(f"runs read the newest {record.max_length:,} events of a history")
    for label, run in comparison.runs.items():
        kind = f"attention {run.attention}" if run.architecture == "ksa" else f"architecture {run.architecture}"
        lines.append(
            f"{label}: run {run.name}, {kind}, {len(run.layers)} layers, k={run.chunk_size}, "
            f"m={run.summaries_per_chunk}, W={run.window_chunks}, trained on span {run.training_span} and at most "
            f"{run.longest_trained_history:,} events, release {run.release_hash[:12]}"
        )
    return lines + _notes(comparison)


def model_table(comparison: Comparison) -> list[list[str]]:
    """Return a row a model, best first, under `HEAD`."""
    found = {
        (row.model, row.slice, row.metric): row
        for row in comparison.rows
        if row.request_time in (None, comparison.told)
    }
    body = []
    for best in comparison.models():
        cells = [best.model]
        for metric in METRICS:
            row = found[best.model, "all", metric]
            cells.append(f"{row.value:.4f} [{row.low:.4f}, {row.high:.4f}]" if metric == METRIC else f"{row.value:.4f}")
        for part, metric in (("repeat", METRIC), ("new", METRIC), ("all", COVERAGE)):
            row = found.get((best.model, part, metric))
            cells.append("" if row is None else f"{row.value:.4f}")
        run = comparison.runs.get(best.model)
        size = None if run is None else run.state_bytes_median
        cells.append("" if size is None else f"{size / 1e3:,.1f}")
        body.append(cells)
    return body


def seed_table(comparison: Comparison) -> list[list[str]]:
    """Return a row a config that several seeds were trained with, under `SEED_HEAD`."""
    body = []
    for group in comparison.seeds:
        cells = [group.name, ", ".join(map(str, group.seeds))]
        for part in ("all", "repeat", "new"):
            found = group.spreads.get(part)
            cells.append("" if found is None else f"{found.mean:.4f} ({found.low:.4f} to {found.high:.4f})")
        body.append(cells)
    return body


def pair_table(comparison: Comparison) -> list[list[str]]:
    """Return a row a pair of models, under `PAIR_HEAD`."""
    return [
        [
            pair.model,
            pair.other,
            f"{pair.difference.value:+.4f} [{pair.difference.low:+.4f}, {pair.difference.high:+.4f}]",
            f"{pair.p:.4f}",
            f"{pair.p_holm:.4f}",
        ]
        for pair in comparison.pairs
    ]


def pair_words(comparison: Comparison) -> str:
    """Return how the pairs were tested."""
    return (
        f"{METRIC}, all targets, paired by user: mean difference [95% interval of {RESAMPLES:,} resamples], two-sided "
        f"p of {FLIPS:,} sign flips, and after Holm's correction for {len(comparison.pairs)} pairs."
    )


def markdown(title: str, comparisons: Sequence[Comparison]) -> str:
    """Return the report as Markdown."""
    parts = [f"# {title}"]
    for comparison in comparisons:
        parts += ["", f"## {PROTOCOL_WORDS[comparison.protocol]}", "", *(f"- {line}" for line in facts(comparison))]
        parts += ["", *table(HEAD, model_table(comparison)), "", _sizes(comparison)]
        if comparison.seeds:
            parts += ["", SEED_WORDS, "", *table(SEED_HEAD, seed_table(comparison))]
        if comparison.pairs:
            parts += ["", pair_words(comparison), "", *table(PAIR_HEAD, pair_table(comparison))]
    return "\n".join(parts) + "\n"


def html(title: str, comparisons: Sequence[Comparison], plots: Sequence[dict[str, bytes]]) -> str:
    """Return the report as one HTML page; `plots` are SVG by title, a dict for each comparison."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for comparison, drawn in zip(comparisons, plots):
        parts.append(f"<h2>{escape(PROTOCOL_WORDS[comparison.protocol])}</h2>")
        parts.append(_html_table(HEAD, model_table(comparison)))
        parts.append(f"<p>{escape(_sizes(comparison))}</p>")
        if comparison.seeds:
            parts += [f"<p>{SEED_WORDS}</p>", _html_table(SEED_HEAD, seed_table(comparison))]
        parts.append('<div class="plots">' + "".join(_html_plot(*plot) for plot in drawn.items()) + "</div>")
        if comparison.pairs:
            parts += [f"<p>{escape(pair_words(comparison))}</p>", _html_table(PAIR_HEAD, pair_table(comparison))]
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in facts(comparison)) + "</ul>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _notes(comparison: Comparison) -> list[str]:
    """Return the notes, those of one wording as one line."""
    models: dict[str, list[str]] = {}
    for model, note in comparison.notes.items():
        models.setdefault(note, []).append(model)
    return [f"{'; '.join(names)}: {note}" for note, names in models.items()]


def _sizes(comparison: Comparison) -> str:
    record = comparison.record
    return (
        f"KB of state: K/V of the median history, {record.median_history:,} events, float32, 1 KB = 1,000 B; full "
        f"attention by the first run's config: {record.full_state_bytes_median / 1e3:,.1f}."
    )


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _html_plot(title: str, svg: bytes) -> str:
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return f'<figure><img alt="{escape(title)}" src="{source}"><figcaption>{escape(title)}</figcaption></figure>'
