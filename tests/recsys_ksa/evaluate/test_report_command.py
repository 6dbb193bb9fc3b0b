import base64
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from recsys_ksa.cli import call_verb, main
from recsys_ksa.errors import DataError, RunError
from recsys_ksa.evaluate.intervals import holm, sign_flip_p
from recsys_ksa.testing import lifelong_log, prepared_dataset, trained_run


def train(data, run, *changes: str) -> Path:
    return trained_run(run, data, [f"name={run.name}", *changes])


def evaluate(run, data, *arguments: str) -> None:
    options = ["--protocol", "loo", "--baselines", "popularity,repeat-last", "--tracking", "none", *arguments]
    call_verb("evaluate", [str(run), "--data", str(data), *options])


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory):
    """Two runs of the same data, evaluated apart."""
    folder = tmp_path_factory.mktemp("runs")
    found = [
        train(tiny_data, folder / "first"),
        train(tiny_data, folder / "second", "seed=1", "model.attention=window"),
    ]
    for run in found:
        evaluate(run, tiny_data)
    return found


def report(runs, out, *arguments: str) -> tuple[str, str]:
    call_verb("report", [*map(str, runs), "--out", str(out), "--tracking", "none", *arguments])
    return (out / "report.html").read_text(), (out / "report.md").read_text()


def test_runs_evaluated_apart_stand_side_by_side(runs, tmp_path):
    page, text = report(runs, tmp_path, "--title", "<Two> runs")
    assert "Over seeds" not in text
    assert text.startswith("# <Two> runs\n")
    assert "<title>&lt;Two&gt; runs</title>" in page
    lines = text[: text.index("paired by user")].splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert {"first", "second", "popularity", "repeat-last", "first, truncated", "first, zeroed"} <= rows.keys()
    for name, run in zip(("first", "second"), runs):
        written = json.loads((run / "evaluation" / "loo" / "rows.json").read_text())
        figure = next(row for row in written if row["model"] == "ksa" and row["slice"] == "all"
                      and row["metric"] == "ndcg@10" and row["request_time"] == "drawn")  # fmt: skip
        assert f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]" in rows[name]
        assert f"{name}</td>" in page
    # One page, nothing beside it: every picture lies inside, nothing is fetched.
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) >= 5
    assert all(base64.b64decode(source.split(",")[1]).startswith(b"<?xml") for source in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", page)


def test_pairs_are_tested_user_by_user(runs, tiny_data, tmp_path):
    """The same difference as `ksa evaluate --compare` gives."""
    _, text = report(runs, tmp_path)
    evaluate(runs[0], tiny_data, "--compare", str(runs[1]), "--out", str(tmp_path / "both"))
    rows = json.loads((tmp_path / "both" / "loo" / "rows.json").read_text())
    expected = next(row for row in rows if row["model"] == "ksa-minus-window" and row["slice"] == "all"
                    and row["metric"] == "ndcg@10" and row["request_time"] == "drawn")  # fmt: skip
    found = next(line for line in text.splitlines() if re.match(r"\| first +\| second", line))
    assert f"{expected['value']:+.4f} [{expected['low']:+.4f}, {expected['high']:+.4f}]" in found


def test_runs_that_differ_in_their_seed_alone_are_also_one_line(runs, tiny_data, tmp_path):
    """Mean, lowest and highest; a run of another config is no part of it."""
    more = [train(tiny_data, tmp_path / f"more-{seed}", f"seed={seed}") for seed in (1, 2)]
    for run in more:
        evaluate(run, tiny_data)
    page, text = report([runs[0], *more, runs[1]], tmp_path / "report")
    models = text[: text.index("Over seeds")].splitlines()
    rows = {line.split("|")[1].strip(): line for line in models if line.startswith("| ")}
    values = [float(rows[name].split("|")[2].split()[0]) for name in ("first", "more-1", "more-2")]
    lines = text[text.index("Over seeds") : text.index("paired by user")].splitlines()
    (line,) = [line for line in lines if line.startswith("| first")]
    mean, low, high = map(float, re.findall(r"[0-9.]+", line.split("|")[3]))
    assert "0, 1, 2" in line
    assert [low, high] == [min(values), max(values)]
    assert mean == pytest.approx(np.mean(values), abs=1e-4)
    assert not [line for line in lines if line.startswith("| second")]
    assert "Over seeds" in page


def test_one_evaluation_with_compared_runs_keeps_its_names(runs, tiny_data, tmp_path):
    evaluate(runs[0], tiny_data, "--compare", str(runs[1]), "--out", str(tmp_path / "both"))
    _, text = report([tmp_path / "both" / "loo"], tmp_path / "report")
    rows = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    assert {"ksa", "window", "truncated", "ksa-zeroed", "ksa-shuffled", "popularity"} <= rows


def test_what_cannot_be_compared_is_refused_with_the_reason(runs, tiny_data, tmp_path, capsys):
    other_data = prepared_dataset(tmp_path, lifelong_log(5, users=30, items=40)).path
    other = train(other_data, tmp_path / "other")
    with pytest.raises(DataError, match=r"was evaluated, found no .*Run `ksa evaluate"):
        report([other], tmp_path / "report")
    evaluate(other, other_data)
    with pytest.raises(RunError, match=r"expected the data of .*figures of different data cannot be compared"):
        report([runs[0], other], tmp_path / "report")
    evaluate(runs[1], tiny_data, "--exclude-seen", "true", "--out", str(tmp_path / "filtered"))
    with pytest.raises(RunError, match=r"exclude-seen .*\(False\), got True"):
        report([runs[0], tmp_path / "filtered"], tmp_path / "report")
    evaluate(runs[1], tiny_data, "--max-length", "24", "--out", str(tmp_path / "short"))
    with pytest.raises(RunError, match=r"max-length .*\(None\), got 24"):
        report([runs[0], tmp_path / "short"], tmp_path / "report")
    evaluate(runs[0], tiny_data, "--request-time", "none", "--out", str(tmp_path / "none"))
    evaluate(runs[1], tiny_data, "--request-time", "drawn", "--out", str(tmp_path / "drawn"))
    with pytest.raises(RunError, match="request time"):
        report([tmp_path / "none", tmp_path / "drawn"], tmp_path / "report")
    record = tmp_path / "short" / "loo" / "evaluation.json"
    changed = json.loads(record.read_text()) | {"split_hash": "0" * 64, "max_length": None}
    record.write_text(json.dumps(changed))
    with pytest.raises(RunError, match="expected the split of"):
        report([runs[0], tmp_path / "short"], tmp_path / "report")
    record.write_text("{}")
    capsys.readouterr()
    assert main(["report", str(tmp_path / "short"), "--out", str(tmp_path / "report"), "--tracking", "none"]) == 2
    assert capsys.readouterr().err.startswith("DataError: ")


def test_an_evaluation_of_other_weights_is_refused(runs, tiny_data, tmp_path):
    run = train(tiny_data, tmp_path / "run")
    evaluate(run, tiny_data)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"release_hash": "1" * 64}))
    with pytest.raises(RunError, match="evaluation of the run's weights"):
        report([run], tmp_path / "report")


def test_a_report_is_one_mlflow_run(runs, tmp_path):
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    report(runs, tmp_path / "report", "--tracking", uri)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "recsys-ksa"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.html", "report.md"}


def test_a_sign_flip_p_is_that_of_all_signs(rng):
    """Few users: against every combination of signs, counted one by one."""
    differences = rng.normal(0.4, 1.0, size=(9, 3)).round(1)
    differences[:, 2] = 0.0
    found = sign_flip_p(differences, draws=40_000)
    for at in range(3):
        observed = abs(differences[:, at].sum())
        sums = [abs(np.dot(signs, differences[:, at])) for signs in itertools.product((-1.0, 1.0), repeat=9)]
        exact = np.mean([total >= observed - 1e-9 for total in sums])
        assert found[at] == pytest.approx(exact, abs=0.015)


def test_a_true_null_is_seldom_rejected():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(60, 300)) * rng.exponential(size=(60, 1))
    assert 0.02 < np.mean(sign_flip_p(differences, draws=2000) < 0.05) < 0.09
    assert np.all(sign_flip_p(differences + 3.0, draws=2000) < 0.01)


def test_holm_corrects_for_the_number_of_tests():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
