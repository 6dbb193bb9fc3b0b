import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys_ksa.cli import call_verb, main
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.errors import MissingPackageError, ProtocolError, RunError, UsageError
from recsys_ksa.evaluate.baselines import NAMES
from recsys_ksa.evaluate.lists import LIST_METRICS
from recsys_ksa.evaluate.protocol import ask
from recsys_ksa.testing import lifelong_log, prepared_dataset, renamed, trained_run

FIELDS = ["model", "protocol", "request_time", "slice", "metric", "value", "low", "high", "num_users"]


@pytest.fixture(scope="module")
def window_run(tiny_data, tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("runs") / "window-run", tiny_data, ["model.attention=window"])


def evaluate(run, data, out, *arguments: str) -> list[dict]:
    command = [str(run), "--data", str(data), "--json", str(out / "rows.json"), "--out", str(out), *arguments]
    call_verb("evaluate", [*command, *(() if "--tracking" in arguments else ("--tracking", "none"))])
    return json.loads((out / "rows.json").read_text())


def test_rows_have_the_form_that_scripts_read(tiny_run, window_run, tiny_data, tmp_path, capsys):
    rows = evaluate(tiny_run, tiny_data, tmp_path, "--compare", str(window_run), "--protocol", "global")
    assert all(list(row) == FIELDS for row in rows)
    models = {row["model"] for row in rows if "-minus-" not in row["model"]}
    assert models == {"ksa", "window", "truncated", "ksa-zeroed", "ksa-shuffled", *NAMES}
    assert {row["model"] for row in rows if "-minus-" in row["model"]} == {f"ksa-minus-{m}" for m in models - {"ksa"}}
    assert {row["metric"] for row in rows} == {"ndcg@10", "hr@10", "recall@10", "mrr", *LIST_METRICS}
    assert {row["protocol"] for row in rows} == {"global"}
    for row in rows:
        simple = row["model"].removeprefix("ksa-minus-")
        replaced = simple.startswith("ksa-")
        assert row["request_time"] in (
            {"drawn"} if replaced else {None} if row["model"] in NAMES else {"target", "drawn", "none"}
        )
        assert row["low"] <= row["value"] + 1e-12
        assert row["value"] <= row["high"] + 1e-12
    keys = [tuple(row[field] for field in FIELDS[:5]) for row in rows]
    assert len(keys) == len(set(keys))
    value = dict(zip(keys, (row["value"] for row in rows)))
    difference = value["ksa-minus-popularity", "global", "drawn", "all", "mrr"]
    expected = value["ksa", "global", "drawn", "all", "mrr"] - value["popularity", "global", None, "all", "mrr"]
    assert difference == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert "## All targets" in printed
    assert "tracking: none" in printed
    assert (tmp_path / "global" / "report.md").exists()
    assert (tmp_path / "global" / "models.png").read_bytes().startswith(b"\x89PNG")


def test_rankings_give_the_figures_again(tiny_run, tiny_data, tmp_path):
    """From the exported file and the log alone: loo and the target's time unless said."""
    file = tmp_path / "rankings.parquet"
    rows = evaluate(tiny_run, tiny_data, tmp_path, "--protocol", "loo", "--baselines", "none", "--rankings", str(file))
    table = pq.read_table(file)
    told = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    dataset = open_dataset(tiny_data)
    assert (told["model"], told["protocol"], told["request_time"]) == ("ksa", "loo", "target")
    assert told["data_hash"] == dataset.manifest.content_hash
    questions, ids = ask(dataset.histories, "loo"), dataset.histories.user_ids()
    ranked: dict[tuple[str, int], dict[str, int]] = {}
    for row in table.to_pylist():
        ranked.setdefault((row["user_id"], row["timestamp"]), {})[row["item_id"]] = row["rank"]
    values = []
    for q in range(len(questions)):
        targets = questions.target_item[questions.target_offsets[q] : questions.target_offsets[q + 1]]
        order = ranked[ids[questions.user[q]], int(questions.timestamp[q])]
        found = [order.get(dataset.items.item_id[item], 10**9) for item in targets]
        gain = sum(1 / np.log2(rank + 1) for rank in found if rank <= 10)
        values.append(gain / sum(1 / np.log2(place + 2) for place in range(min(len(targets), 10))))
    figure = next(
        row["value"]
        for row in rows
        if (row["model"], row["request_time"], row["slice"], row["metric"]) == ("ksa", "target", "all", "ndcg@10")
    )
    assert figure == pytest.approx(np.mean(values))


def test_a_seen_filter_hides_what_the_user_had(tiny_run, tiny_data, tmp_path):
    file = tmp_path / "rankings.parquet"
    evaluate(
        tiny_run, tiny_data, tmp_path, "--protocol", "loo", "--baselines", "none", "--rankings", str(file),
        "--exclude-seen", "true", "--request-time", "none",
    )  # fmt: skip
    dataset = open_dataset(tiny_data)
    questions, ids = ask(dataset.histories, "loo"), dataset.histories.user_ids()
    listed: dict[str, set[str]] = {}
    for row in pq.read_table(file).to_pylist():
        listed.setdefault(row["user_id"], set()).add(row["item_id"])
    for q in range(len(questions)):
        rows = slice(dataset.histories.offsets[questions.user[q]], None)
        own = set(dataset.histories.item_index[rows][: questions.cut[q]].tolist())
        target = set(questions.target_item[questions.target_offsets[q] : questions.target_offsets[q + 1]].tolist())
        shown = {dataset.item_index[item] for item in listed[ids[questions.user[q]]]}
        assert not shown & (own - target)
        assert target <= shown


def test_all_honest_protocols_in_one_call(tiny_run, tiny_data, tmp_path):
    rows = evaluate(
        tiny_run, tiny_data, tmp_path, "--protocol", "all", "--request-time", "drawn", "--baselines", "popularity"
    )
    assert {row["protocol"] for row in rows} == {"loo", "loo-classic", "global"}
    assert any(row["slice"] == "gap-positive" and row["protocol"] == "loo-classic" for row in rows)
    assert {row["request_time"] for row in rows} == {"drawn", None}


def test_runs_of_other_data_or_spans_are_refused(tiny_run, tiny_data, tmp_path, capsys):
    other = prepared_dataset(tmp_path, lifelong_log(5, users=20, items=30))
    with pytest.raises(RunError, match="data hash"):
        evaluate(tiny_run, other.path, tmp_path)
    (tmp_path / "renamed").mkdir()
    twin = prepared_dataset(tmp_path / "renamed", renamed(lifelong_log(5, users=20, items=30), "item_id"))
    assert twin.manifest.content_hash == other.manifest.content_hash  # of numbers alone
    with pytest.raises(RunError, match=r"expected the 30 items of .*, in their order, got 30 others"):
        evaluate(trained_run(tmp_path / "other", other.path), twin.path, tmp_path)
    run = trained_run(tmp_path / "loo-run", tiny_data, ['data.split="loo"'])
    with pytest.raises(ProtocolError, match=r"trained on validation or test events.*'loo'"):
        evaluate(run, tiny_data, tmp_path, "--protocol", "global")
    with pytest.raises(ProtocolError, match="trained on"):
        evaluate(tiny_run, tiny_data, tmp_path, "--compare", str(run), "--protocol", "global")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(tiny_data), "--protocol", "global", "--tracking", "none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ProtocolError: global:")
    assert error.count("\n") == 1


def test_runs_may_read_the_newest_events_only(tiny_run, tiny_data, tmp_path, capsys):
    """At the window's length the run is its own truncated form; the rankings file says what was read."""
    file = tmp_path / "rankings.parquet"
    rows = evaluate(
        tiny_run, tiny_data, tmp_path, "--protocol", "loo", "--baselines", "popularity", "--request-time", "none",
        "--max-length", "24", "--rankings", str(file),
    )  # fmt: skip
    value = {(row["model"], row["slice"], row["metric"]): row["value"] for row in rows}
    assert all(value[row["model"].replace("ksa", "truncated", 1), row["slice"], row["metric"]] == row["value"]
               for row in rows if row["model"] == "ksa")  # fmt: skip
    assert pq.read_schema(file).metadata[b"max_length"] == b"24"
    assert "runs read the newest 24 events" in capsys.readouterr().out


def test_mistakes_are_named(tiny_run, tiny_data, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="--baselines"):
        evaluate(tiny_run, tiny_data, tmp_path, "--baselines", "popularitea")
    with pytest.raises(UsageError, match="chunk_size 8, got 7"):
        evaluate(tiny_run, tiny_data, tmp_path, "--max-length", "7")
    with pytest.raises(UsageError, match="can be written"):
        evaluate(tiny_run, tiny_data, tmp_path, "--rankings", "/dev/null/rankings.parquet")
    with pytest.raises(UsageError, match="--device"):
        evaluate(tiny_run, tiny_data, tmp_path, "--device", "abacus")
    for name in ("mlflow", "mlflow.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match="--tracking none"):
        evaluate(tiny_run, tiny_data, tmp_path, "--tracking", f"sqlite:///{tmp_path}/mlflow.db")


def test_one_evaluation_is_one_mlflow_run(tiny_run, tiny_data, tmp_path):
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    rows = evaluate(
        tiny_run, tiny_data, tmp_path, "--protocol", "loo", "--baselines", "popularity", "--request-time", "none",
        "--tracking", uri,
    )  # fmt: skip
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "recsys-ksa"]
    (run,) = client.search_runs([experiment.experiment_id])
    figure = next(row["value"] for row in rows if row["model"] == "ksa" and row["metric"] == "ndcg@10")
    assert run.data.metrics["ksa.none.all.ndcg_10"] == pytest.approx(figure)
    assert run.data.params["model.chunk_size"] == "8"
    assert run.data.params["data_hash"] == open_dataset(tiny_data).manifest.content_hash
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"report.md", "rows.json", "models.png", "state.png", "history-length.png", "training.png"} <= files
    assert client.get_metric_history(run.info.run_id, "training.valid_ndcg_10")
