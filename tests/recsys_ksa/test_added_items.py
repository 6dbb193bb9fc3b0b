"""Items met after training join a run: their rows are their content, and everything else stays as it was."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from recsys_ksa import Recommender
from recsys_ksa.cli import call_verb, main
from recsys_ksa.errors import RunError
from recsys_ksa.run import open_run
from recsys_ksa.testing import item_table, lifelong_log, prepared_dataset, trained_run

SIDE = 'items = {side_features = ["category"], multi_features = ["genres"], vectors = {text = ["text"]}}\n'
ITEMS = 150
CONTENT = ['model.side_features=["category","genres","text"]', "model.item_vectors=content", "model.own_item_bias=true"]


def described(items: int, seed: int) -> pa.Table:
    """Return items with a category, some genres and a vector each."""
    draw = np.random.default_rng(seed)
    genres = [[f"g{n}" for n in draw.choice(9, draw.integers(0, 4), replace=False)] for _ in range(items)]
    text = pa.FixedSizeListArray.from_arrays(pa.array(draw.normal(size=3 * items), pa.float32()), 3)
    table = item_table(items, seed=seed)
    return table.append_column("genres", pa.array(genres, pa.list_(pa.string()))).append_column("text", text)


def two_datasets(folder: Path, seed: int, items: pa.Table | None, config: str = "") -> tuple[Path, Path, pa.Table]:
    """Prepare the older 60% of a log, and all of it; return their folders and the log."""
    log = lifelong_log(seed, users=30, items=ITEMS, median_length=25, repeat_share=0.2)
    older = log.filter(pc.less(log["timestamp"], int(np.quantile(log["timestamp"].to_numpy(), 0.3))))
    found = []
    for name, part in (("older", older), ("all", log)):
        (folder / name).mkdir()
        options = ["--tie", "arrival"]
        found.append(prepared_dataset(folder / name, part, items=items, arguments=options, config=config).path)
    return found[0], found[1], log


def add(run: Path, data: Path, out: Path) -> Path:
    call_verb("add-items", [str(run), "--data", str(data), "--out", str(out)])
    return out


def answer(rec: Recommender, items: Sequence[str], times: Sequence[int]) -> dict[str, float]:
    state = rec.append(rec.new_state(), items, times)
    return dict(rec.recommend(state, k=200, request_time=times[-1], exclude_seen=False))


@pytest.mark.parametrize("changes", [CONTENT, ["model.item_vectors=untied", "model.item_bias=learned"]])
def test_what_was_known_stays_and_what_is_new_is_its_content(tmp_path: Path, seed: int, changes: list[str]):
    older, whole, log = two_datasets(tmp_path, seed, described(ITEMS, seed), SIDE)
    run = trained_run(tmp_path / "run", older, changes, steps=2)
    more = add(run, whole, tmp_path / "more")
    before, after = open_run(run), open_run(more)
    known = before.info.num_items
    assert after.info.num_items > known
    assert after.items.item_id[:known] == before.items.item_id
    assert set(after.items.item_id) >= set(log["item_id"].to_pylist())
    assert (after.info.state_fingerprint, after.info.num_base_items) == (before.info.state_fingerprint, known)
    assert after.info.release_hash != before.info.release_hash

    weights, wider = load_file(run / "model.safetensors"), load_file(more / "model.safetensors")
    for name, value in weights.items():
        assert wider[name][: len(value)].equal(value) if value.dim() else wider[name].equal(value)
        if len(wider[name].shape) and len(wider[name]) != len(value):
            new = wider[name][known:]
            assert (new == value[1:].min()).all() if name == "item_bias" else not new.any()

    items = pq.read_table(more / "items.parquet")
    told = {row["item_id"]: row for row in described(ITEMS, seed).to_pylist()}
    vocab = {n: pq.read_table(more / "vocab" / f"{n}.parquet")["value"].to_pylist() for n in ("category", "genres")}
    for row in items.slice(known).to_pylist():
        expected = told[row["item_id"]]
        category = expected["category"] if expected["category"] in vocab["category"] else None
        assert vocab["category"][row["category_index"]] == category
        assert {vocab["genres"][n] for n in row["genres_indices"]} == set(expected["genres"]) & set(vocab["genres"])
        assert row["text_vector"] == pytest.approx(expected["text"])
        assert row["title"] == expected["title"]

    recs = Recommender.load(run), Recommender.load(more)
    assert recs[0].fingerprint == recs[1].fingerprint
    history = [item for item in before.items.item_id if item is not None][:20]
    times = [1_700_000_000 + n for n in range(len(history))]
    old, new = (answer(rec, history, times) for rec in recs)
    assert old == pytest.approx({item: score for item, score in new.items() if item in old}, abs=1e-5)
    assert set(new) == set(after.items.item_id) - {None}


def test_items_are_added_again_and_again(tmp_path: Path, seed: int, tiny_run: Path, tiny_data: Path):
    """Every day's run covers the same states; nothing new leaves the release what it is."""
    log = lifelong_log(seed, users=20, items=400, median_length=40)
    (tmp_path / "later").mkdir()
    later = prepared_dataset(tmp_path / "later", log, items=item_table(400)).path
    same = open_run(add(tiny_run, tiny_data, tmp_path / "same"))
    more = open_run(add(tmp_path / "same", later, tmp_path / "more"))
    again = open_run(add(tmp_path / "more", later, tmp_path / "again"))
    first = open_run(tiny_run)
    assert same.info.release_hash == first.info.release_hash
    assert again.info.release_hash == more.info.release_hash != first.info.release_hash
    assert {run.info.num_base_items for run in (same, more, again)} == {first.info.num_items}
    call_verb("index", [str(tmp_path / "again"), "--export", str(tmp_path / "bundle")])
    assert len(Recommender.load(tmp_path / "bundle").run.items.item_id) == again.info.num_items


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, seed: int, tiny_run: Path, capsys):
    older, whole, _ = two_datasets(tmp_path, seed, None)
    with pytest.raises(RunError, match=r"expected items with the run's column '(title|category_index)', got none"):
        add(tiny_run, whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run = trained_run(tmp_path / "run", older)
    assert main(["add-items", str(run), "--data", str(whole), "--out", str(run)]) == 2
    assert "expected a path that does not exist yet" in capsys.readouterr().err
    assert main(["add-items", str(run), "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"release_hash": "1" * 64}))
    with pytest.raises(RunError, match="weights were replaced"):
        add(run, whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()
