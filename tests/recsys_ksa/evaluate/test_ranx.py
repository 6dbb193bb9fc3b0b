"""Our metrics against those of an independent library, on the same rankings. Skips where ranx is not installed."""

import json
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys_ksa.cli import call_verb
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.evaluate.protocol import ask

OURS = {"ndcg@10": "ndcg@10", "hr@10": "hit_rate@10", "recall@10": "recall@10", "mrr": "mrr"}


@pytest.mark.parametrize("protocol", ["loo", "global"])
@pytest.mark.parametrize("exclude_seen", ["true", "false"])
def test_ranx_gives_the_same_figures(protocol, exclude_seen, tiny_run, tiny_data, tmp_path):
    """From the exported Parquet file, set targets and all; the file holds every item of this small catalogue."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranx = pytest.importorskip("ranx")
    file, rows_file = tmp_path / "rankings.parquet", tmp_path / "rows.json"
    call_verb("evaluate", [
        str(tiny_run), "--data", str(tiny_data), "--protocol", protocol, "--request-time", "drawn", "--out",
        str(tmp_path), "--json", str(rows_file), "--rankings", str(file), "--exclude-seen", exclude_seen,
        "--baselines", "none", "--tracking", "none",
    ])  # fmt: skip
    dataset = open_dataset(tiny_data)
    questions, ids = ask(dataset.histories, protocol), dataset.histories.user_ids()
    wanted: dict[str, dict[str, int]] = {}
    for question, item in zip(questions.target_question.tolist(), questions.target_item.tolist()):
        key = f"{ids[questions.user[question]]} {questions.timestamp[question]}"
        wanted.setdefault(key, {})[dataset.items.item_id[item] or "unknown"] = 1
    ranked: dict[str, dict[str, float]] = {}
    for row in pq.read_table(file).to_pylist():
        ranked.setdefault(f"{row['user_id']} {row['timestamp']}", {})[row["item_id"]] = -float(row["rank"])
    # Untouched by the library's order of keys: figures are looked up by question.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = ranx.Run(ranked)
        ranx.evaluate(ranx.Qrels(wanted), run, list(OURS.values()), return_mean=False)
    written = {
        row["metric"]: row["value"]
        for row in json.loads(rows_file.read_text())
        if (row["model"], row["slice"]) == ("ksa", "all")
    }
    for ours, theirs in OURS.items():
        by_user: dict[str, list[float]] = {}
        for question, value in run.scores[theirs].items():
            by_user.setdefault(question.split()[0], []).append(float(value))
        assert len(by_user) == len(np.unique(questions.user))
        assert written[ours] == pytest.approx(np.mean([np.mean(values) for values in by_user.values()]), abs=1e-9)
