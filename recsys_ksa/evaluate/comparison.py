"""Several evaluations side by side: read, checked for being comparable, named apart, tested in pairs.

U users, P pairs of models.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys_ksa.errors import DataError, RunError
from recsys_ksa.evaluate.intervals import Bootstrap, Interval, holm, sign_flip_p
from recsys_ksa.evaluate.metrics import METRICS
from recsys_ksa.evaluate.protocol import PROTOCOLS, ProtocolName, RequestTime, usefulness
from recsys_ksa.evaluate.record import RECORD_FILE, Record, Recorded, RunRecord, read_record
from recsys_ksa.evaluate.rows import MAIN, Row
from recsys_ksa.evaluate.seeds import SeedGroup, group_by_seed

FOLDER = "evaluation"
"""Where `ksa evaluate` leaves its protocols in a run."""
METRIC = METRICS[0]
_DIFFERENCE = f"{MAIN}-minus-"


@dataclass(frozen=True)
class Pair:
    """A paired test of one model against another on `METRIC`, all targets."""

    model: str
    other: str
    difference: Interval
    p: float
    """Two-sided, of the sign-flip test over users."""
    p_holm: float
    """The same after Holm's correction for the number of pairs."""


@dataclass(frozen=True)
class Comparison:
    """Everything one protocol has to show."""

    protocol: ProtocolName
    told: RequestTime
    record: Record
    """Of the first evaluation: data, counts and audit are the same for all."""
    runs: dict[str, RunRecord]
    """By label, in the order given."""
    rows: list[Row]
    """Under their labels, differences left out."""
    pairs: list[Pair]
    seeds: list[SeedGroup]
    """Runs of one config, over their seeds."""
    notes: dict[str, str]

    def models(self, part: str = "all", metric: str = METRIC) -> list[Row]:
        """Return each model's row of a slice at the request time `told`, best first."""
        found = [
            row
            for row in self.rows
            if row.slice == part and row.metric == metric and row.request_time in (None, self.told)
        ]
        return sorted(found, key=lambda row: -row.value)


def read_evaluations(path: Path) -> list[Recorded]:
    """Return the evaluations of a run, one a protocol; or the one in a folder that `ksa evaluate --out` wrote.

    Raises:
        DataError: there is none, or one is damaged.
        RunError: the run's weights have changed since.
    """
    if (path / RECORD_FILE).exists():
        return [read_record(path)]
    folders = sorted(file.parent for base in (path / FOLDER, path) for file in base.glob(f"*/{RECORD_FILE}"))
    if not folders:
        raise DataError(
            f"{path}: expected a run that was evaluated, found no {FOLDER}/*/{RECORD_FILE} in it. "
            f"Run `ksa evaluate {path} --data DS` first."
        )
    found = [read_record(folder) for folder in folders]
    if (path / "run.json").exists():
        now = json.loads((path / "run.json").read_text(encoding="utf-8")).get("release_hash")
        for recorded in found:
            if recorded.record.runs[0].release_hash != now:
                raise RunError(
                    f"{recorded.path}: expected an evaluation of the run's weights ({str(now)[:12]}), got one of "
                    f"{recorded.record.runs[0].release_hash[:12]}. Run `ksa evaluate` again."
                )
    return found


def compare(evaluations: Sequence[Recorded]) -> list[Comparison]:
    """Return one comparison a protocol.

    Raises:
        RunError: the evaluations cannot be compared; with the reason.
    """
    check_comparable(evaluations)
    found = []
    for protocol in PROTOCOLS:
        chosen = [recorded for recorded in evaluations if recorded.record.protocol == protocol]
        if chosen:
            found.append(_compare(protocol, chosen))
    return found


def check_comparable(evaluations: Sequence[Recorded]) -> None:
    """Refuse to lay figures side by side that answer different questions.

    Raises:
        RunError: other data, another split, seen filter, length or request times; with both sides.
    """
    first: dict[ProtocolName, Recorded] = {}
    for recorded in evaluations:
        same_data = next(iter(first.values()), recorded)
        for key, what in (("data_hash", "data"), ("split_hash", "split")):
            _same(same_data, recorded, key, what, "figures of different {} cannot be compared")
        same_protocol = first.setdefault(recorded.record.protocol, recorded)
        why = "they rank other items or read other events. Evaluate all with the same --{}"
        _same(same_protocol, recorded, "exclude_seen", "exclude-seen", why)
        _same(same_protocol, recorded, "max_length", "max-length", why)
        if not set(same_protocol.record.variants) & set(recorded.record.variants):
            raise RunError(
                f"{recorded.path}: expected a request time of {same_protocol.path} "
                f"({', '.join(same_protocol.record.variants)}), got {', '.join(recorded.record.variants)}. "
                "Evaluate both with the same --request-time."
            )


def _same(one: Recorded, other: Recorded, key: str, what: str, why: str) -> None:
    expected, found = getattr(one.record, key), getattr(other.record, key)
    if expected != found:
        expected, found = (str(value)[:12] for value in (expected, found))
        raise RunError(
            f"{other.path}: expected the {what} of {one.path} ({expected}), got {found}: {why.format(what)}."
        )


def _compare(protocol: ProtocolName, chosen: Sequence[Recorded]) -> Comparison:
    shared = set.intersection(*(set(recorded.record.variants) for recorded in chosen))
    told = usefulness([variant for variant in chosen[0].record.variants if variant in shared])
    runs: dict[str, RunRecord] = {}
    rows: dict[tuple[str, RequestTime | None, str, str], Row] = {}
    users: dict[str, dict[str, float]] = {}
    notes: dict[str, str] = {}
    for recorded in chosen:
        labels = _labels(recorded.record, runs, alone=len(chosen) == 1)
        runs |= {labels[run.model]: run for run in recorded.record.runs}
        for row in recorded.rows:
            if not row.model.startswith(_DIFFERENCE):
                label = labels.get(row.model, row.model)
                rows.setdefault((label, row.request_time, row.slice, row.metric), replace(row, model=label))
        for model, values in _user_values(recorded.users, told).items():
            users.setdefault(labels.get(model, model), values)
        notes |= {labels.get(model, model): note for model, note in recorded.record.notes.items()}
    comparison = Comparison(protocol, told, chosen[0].record, runs, list(rows.values()), [], [], notes)
    told_rows = [row for row in comparison.rows if row.metric == METRIC and row.request_time == told]
    return replace(comparison, pairs=_pairs(comparison, users), seeds=group_by_seed(runs, told_rows))


def _labels(record: Record, known: dict[str, RunRecord], *, alone: bool) -> dict[str, str]:
    """Return what each model of an evaluation is called among all: runs by name, equal names apart by release."""
    labels: dict[str, str] = {}
    for run in record.runs:
        label = run.model if alone else run.name
        if label in known and known[label].release_hash != run.release_hash:
            label = f"{label} ({run.release_hash[:6]})"
        labels[run.model] = label
    if not alone:
        for derived in ("truncated", f"{MAIN}-zeroed", f"{MAIN}-shuffled"):
            labels[derived] = f"{labels[MAIN]}, {derived.removeprefix(f'{MAIN}-')}"
    return labels


def _user_values(users: pa.Table, told: RequestTime) -> dict[str, dict[str, float]]:
    """Return each model's value of `METRIC` on all targets, by user."""
    words = {name: np.array(users[name].to_pylist(), dtype=object) for name in users.column_names if name != "value"}
    kept = (words["slice"] == "all") & (words["metric"] == METRIC)
    kept &= np.isin(words["request_time"].astype(str), (str(None), told))
    found: dict[str, dict[str, float]] = {}
    for model, user, value in zip(words["model"][kept], words["user_id"][kept], users["value"].to_numpy()[kept]):
        found.setdefault(model, {})[user] = float(value)
    return found


def _pairs(comparison: Comparison, users: dict[str, dict[str, float]]) -> list[Pair]:
    """Test every run against every other, and against the best model that is none."""
    others = [row.model for row in comparison.models() if row.request_time is None]
    names = [*(label for label in comparison.runs if label in users), *others[:1]]
    if len(names) < 2:
        return []
    # In the order of the file: the resamples are then those of `ksa evaluate`.
    everyone = [user for user in users[names[0]] if all(user in users[name] for name in names)]
    values = np.array([[users[name][user] for name in names] for user in everyone], dtype=np.float64)
    bootstrap = Bootstrap(values)
    chosen = list(combinations(range(len(names)), 2))
    differences: NDArray[np.float64] = np.stack([values[:, one] - values[:, other] for one, other in chosen], axis=1)
    p = sign_flip_p(differences)
    return [
        Pair(names[one], names[other], bootstrap.difference(one, other), float(alone), float(corrected))
        for (one, other), alone, corrected in zip(chosen, p, holm(p))
    ]
