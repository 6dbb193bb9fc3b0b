import sys

import pytest

from ksa_pipelines.inspection import inspect
from recsys_ksa.cli import main

DAY = 86_400
LOG = {
    "user_id": ["a"] * 6 + ["b"] * 2,
    "item_id": ["x", "y", "x", "x", "z", "y", "x", "x"],
    "timestamp": [0, 0, 60, 10_000, 3 * DAY, 3 * DAY + 1_800, 5, 5 + DAY],
}


def test_the_figures_are_those_of_a_log_small_enough_to_count(prepared, monkeypatch):
    monkeypatch.setattr("ksa_pipelines.inspection.BLOCK", 3)  # users in blocks of their own
    found = inspect(prepared(LOG))
    assert sorted(found.lengths.tolist()) == [2, 6]
    assert found.item_counts.tolist() == [5, 2, 1]
    assert dict(found.days) == {0: 5, 1: 1, 3: 2}
    assert found.gap_0 == 1
    assert found.gaps[0] == 2
    # a: x y x x z y: x again after 2, x after 1, y after 4; b: x x after 1.
    assert found.repeats == 4
    assert dict(found.distances) == {0: 2, 1: 1, 2: 1}
    # a: [0, 0, 60], [10000], [3 days], [30 minutes later]; b: two.
    assert dict(found.sessions) == {0: 5, 1: 1}
    assert found.split["loo: test"] == 1  # a's last event; b has two distinct times and only trains


def test_the_report_is_one_file_with_plots_and_the_rows_left_out(prepared, tmp_path, capsys):
    log = {name: [*column, None if name == "user_id" else column[0]] for name, column in LOG.items()}
    dataset = prepared(log)
    assert main(["inspect", str(dataset.path), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 6
    assert "null user_id" in page
    for outside in ("src=", 'href="http', "@import"):
        assert outside not in page
    assert "before 1990" in capsys.readouterr().out


def test_names_in_the_report_are_escaped(prepared, tmp_path):
    log = {"user_id": ["", "a"], "item_id": ["<script>x", "<script>x"], "timestamp": [1, 2]}
    assert main(["inspect", str(prepared(log).path), "--out", str(tmp_path / "r.html")]) == 0
    assert "<script>" not in (tmp_path / "r.html").read_text()


def test_without_matplotlib_the_extra_is_named(prepared, tmp_path, capsys, monkeypatch):
    path = prepared(LOG).path
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["inspect", str(path), "--out", str(tmp_path / "r.html")]) == 2
    assert "recsys-ksa[evaluate]" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["missing/r.html", "."])
def test_a_report_that_cannot_be_written_is_one_line(prepared, tmp_path, capsys, target):
    assert main(["inspect", str(prepared(LOG).path), "--out", str(tmp_path / target)]) == 2
    assert "expected to write the report" in capsys.readouterr().err
