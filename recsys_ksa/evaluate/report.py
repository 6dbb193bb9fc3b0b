"""The report of an evaluation: Markdown tables that are also readable in a terminal.

Models stand in order of their figure, baselines among them: where a count wins, it stands first.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recsys_ksa.evaluate.evaluation import TRUNCATED, Evaluation, NamedRun
from recsys_ksa.evaluate.intervals import RESAMPLES
from recsys_ksa.evaluate.ksa_scorer import window_events
from recsys_ksa.evaluate.lists import LIST_METRICS
from recsys_ksa.evaluate.metrics import METRICS
from recsys_ksa.evaluate.protocol import RequestTime, usefulness
from recsys_ksa.evaluate.rows import MAIN, Row
from recsys_ksa.model.state import full_kv_bytes, kv_bytes

if TYPE_CHECKING:
    from recsys_ksa.data.dataset import Dataset

TITLES = {
    "all": "All targets",
    "repeat": 'The list "again": repeat targets, ranked among the items the user had',
    "new": 'The list "new for you": first purchases, ranked among the items the user never had',
    "gap-0": "Gap 0: the target shares its time with the event before it",
    "gap-positive": "Gap above 0",
}
PROTOCOL_WORDS = {
    "loo": "loo: all events at a user's last timestamp, as one set, from strictly earlier events",
    "loo-classic": "loo-classic: a user's last event from all before it, in tie order",
    "global": "global: each timestamp of the test days (a user's first 50), as one set, from strictly earlier events",
}
_PREFIX = f"{MAIN}-minus-"


def markdown(evaluation: Evaluation, dataset: "Dataset", runs: Sequence[NamedRun]) -> str:
    """Return the whole report of one protocol."""
    parts = [f"# Evaluation of {runs[0].run.info.name}, {PROTOCOL_WORDS[evaluation.protocol]}", ""]
    parts += [f"- {line}" for line in facts(evaluation, dataset, runs)]
    names = list(dict.fromkeys(row.slice for row in evaluation.rows))
    for name in names:
        if name in TITLES:
            parts += ["", f"## {TITLES[name]}", "", *figures(evaluation.rows, name)]
    told = usefulness(evaluation.variants)
    parts += ["", f"## ndcg@10: {MAIN} (request time {told}) minus each other, paired by user", ""]
    parts += differences(evaluation.rows, told, [name for name in names if name in TITLES])
    parts += ["", "## ndcg@10 by events known (both ends included)", ""]
    parts += by_slice(evaluation.rows, told, [name for name in names if name.startswith("length-")])
    met = [name for name in names if name.startswith("distance-")]
    parts += ["", f"## ndcg@10 by where the target was last met: {', '.join(met)}", ""]
    parts += by_slice(evaluation.rows, told, met)
    parts += ["", "## The lists themselves", "", *lists(evaluation.rows, told)]
    parts += ["", "## State: K/V of one user", "", *state_sizes(dataset, runs[0]), ""]
    return "\n".join(parts)


def facts(evaluation: Evaluation, dataset: "Dataset", runs: Sequence[NamedRun]) -> list[str]:
    """Return what must be known to read the tables."""
    manifest, audit = dataset.manifest, dataset.manifest.tie_audit
    greater = "none tied" if audit.next_id_greater is None else f"{audit.next_id_greater:.4f}"
    lines = [
        f"{evaluation.num_users:,} users, {evaluation.num_questions:,} questions, {evaluation.num_targets:,} targets "
        f"({evaluation.repeat_share:.1%} repeats), {dataset.num_items - 1:,} items, all ranked; ties against the model",
        f"seen filter {'on (a target is never removed)' if evaluation.exclude_seen else 'off'}; "
        f"a figure is the mean over users of the user's mean, [95% interval of {RESAMPLES:,} resamples of users]",
        f"request time shown: {', '.join(evaluation.variants)}; "
        + (
            "a target's own time tells more than a real request does: judge usefulness by drawn"
            if "drawn" in evaluation.variants
            else "an ordinal clock has no intervals"
            if manifest.clock == "ordinal"
            else "as asked"
        ),
        f"ties: {audit.gap_0_share:.1%} of gaps are 0, {audit.tied_target_share:.1%} of last events share the time of "
        f"the one before, P(next id > id | tie) = {greater} over {audit.num_tied_pairs:,} pairs"
        f"{' (sorted by the source)' if audit.is_artefact else ''}; order inside ties: {manifest.tie}",
        f"data {manifest.content_hash}, split {manifest.split_hash}, clock {manifest.clock}",
    ]
    if evaluation.max_length is not None:
        lines.append(
            f"runs read the newest {evaluation.max_length:,} events of each history at most, cut at a chunk boundary"
        )
    for named in runs:
        model = named.run.config.model
        read = f", reads the newest {named.network.max_length:,} events" if named.network.max_length else ""
        kind = f"attention {model.attention}" if model.architecture == "ksa" else f"architecture {model.architecture}"
        lines.append(
            f"{named.name}: run {named.run.info.name}, {kind}, k={model.chunk_size}, "
            f"m={model.summaries_per_chunk}, W={model.window_chunks}{read}, trained on span "
            f"{named.run.info.training_span}, release {named.run.info.release_hash[:12]}"
        )
    if any(row.model == TRUNCATED for row in evaluation.rows):
        window = window_events(runs[0].run.config.model)
        lines.append(f"{TRUNCATED}: {MAIN}'s weights on the last {window} events of each history")
    if any(row.model == f"{MAIN}-zeroed" for row in evaluation.rows):
        lines.append(
            f"{MAIN}-zeroed, {MAIN}-shuffled: {MAIN}'s weights with every stored summary replaced by zeros, or by "
            "that of another user of the same age; item counts are the user's own"
        )
    return lines + [f"{name}: {note}" for name, note in evaluation.notes.items()]


def figures(rows: Sequence[Row], part: str) -> list[str]:
    """Return the table of models by metrics on one slice, best ndcg@10 first."""
    cells: dict[tuple[str, RequestTime | None], dict[str, Row]] = {}
    for row in rows:
        if row.slice == part and row.metric in METRICS and not row.model.startswith(_PREFIX):
            cells.setdefault((row.model, row.request_time), {})[row.metric] = row
    order = sorted(cells, key=lambda key: -cells[key][METRICS[0]].value)
    body = [[_label(*key), *(_figure(cells[key][metric]) for metric in METRICS)] for key in order]
    count = cells[order[0]][METRICS[0]].num_users
    return [*table(["model", *METRICS], body), "", f"{count:,} users."]


def differences(rows: Sequence[Row], told: RequestTime, parts: Sequence[str]) -> list[str]:
    """Return the table of paired differences on ndcg@10, one column a slice."""
    found = {
        (row.model, row.slice): row
        for row in rows
        if row.model.startswith(_PREFIX) and row.request_time == told and row.metric == "ndcg@10"
    }
    names = list(dict.fromkeys(model for model, _ in found))
    body = [[name.removeprefix(_PREFIX), *(_difference(found.get((name, part))) for part in parts)] for name in names]
    return [*table([f"{MAIN} minus", *parts], body), "", "+ better, - worse, ? the interval holds 0."]


def lists(rows: Sequence[Row], told: RequestTime) -> list[str]:
    """Return how much each model's lists reach, and how popular they are."""
    found = {
        (row.model, row.metric): row
        for row in rows
        if row.metric in LIST_METRICS and row.request_time in (None, told) and not row.model.startswith(_PREFIX)
    }
    names = list(dict.fromkeys(model for model, _ in found))
    body = [[name, *(f"{found[(name, metric)].value:.4f}" for metric in LIST_METRICS)] for name in names]
    meaning = (
        "coverage@10: share of all items in at least one list; novelty@10: mean -log2 of an item's share of the "
        "training events; popularity-bias@10: log2 of the list's popularity over that of the user's own events."
    )
    return [*table(["model", *LIST_METRICS], body), "", meaning]


def by_slice(rows: Sequence[Row], told: RequestTime, parts: Sequence[str]) -> list[str]:
    """Return ndcg@10 of each model in each of these slices."""
    found = {
        (row.model, row.slice): row
        for row in rows
        if row.metric == "ndcg@10" and row.request_time in (None, told) and not row.model.startswith(_PREFIX)
    }
    names = list(dict.fromkeys(model for model, _ in found))
    users = ["users", *(f"{found[(names[0], part)].num_users:,}" for part in parts)]
    body = [[name, *(f"{found[(name, part)].value:.4f}" for part in parts)] for name in names]
    return table(["model", *(part.split("-", 1)[1] for part in parts)], [*body, users])


def state_sizes(dataset: "Dataset", named: NamedRun) -> list[str]:
    """Return K/V KB of one user at the median and the longest history, against full attention in every layer."""
    config = named.run.config.model
    if config.architecture != "ksa":
        return [f"{named.name} keeps no state: it reads each history anew."]
    lengths = dataset.histories.lengths
    body = []
    for word, length in (("median", int(np.median(lengths))), ("longest", int(lengths.max()))):
        kept, whole = kv_bytes(config, length), full_kv_bytes(config, length)
        share = f"{kept / whole:.1%}" if whole else "-"
        body.append([word, f"{length:,}", f"{kept / 1e3:,.1f}", f"{whole / 1e3:,.1f}", share])
    k, m, w = config.chunk_size, config.summaries_per_chunk, config.window_chunks
    lines = table(["history", "events", f"{named.name}, KB", "full attention, KB", "share"], body)
    if config.attention == "summary" and k > m:
        lines += ["", f"float32, 1 KB = 1,000 B. Summaries save nothing before {w * k * k / (k - m):,.0f} events."]
    return lines


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table whose columns line up in a terminal."""
    rows = [list(head), *(list(row) for row in body)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]


def _label(model: str, request_time: RequestTime | None) -> str:
    return model if request_time is None else f"{model} ({request_time})"


def _figure(row: Row) -> str:
    return f"{row.value:.4f} [{row.low:.4f}, {row.high:.4f}]"


def _difference(row: Row | None) -> str:
    if row is None:
        return ""
    verdict = "+" if row.low > 0 else "-" if row.high < 0 else "?"
    return f"{verdict} {row.value:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
