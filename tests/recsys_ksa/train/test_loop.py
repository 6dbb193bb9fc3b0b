"""Training writes a whole run, resumes to the same bytes, stops when told, and learns."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_ksa.config import RunConfig
from recsys_ksa.data.dataset import Dataset
from recsys_ksa.data.negatives import training_counts
from recsys_ksa.data.spans import training_end
from recsys_ksa.errors import ConfigError, RunError
from recsys_ksa.run import load_network, open_run
from recsys_ksa.testing import lifelong_log, prepared_dataset, renamed
from recsys_ksa.train.loop import Report, Trained, resolve_config, train
from recsys_ksa.train.validation import Validation

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
TIMES = ("seconds", "tokens_per_second", "waiting_share")


def go(
    config: RunConfig,
    dataset: Dataset,
    run: Path,
    stop_at: int | None = None,
    resume: bool = False,
    report: Callable[[Report], None] = lambda report: None,
) -> Trained:
    return train(config, dataset, run, device=CPU, stop_at=stop_at, resume=resume, report=report)


def rows(run: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


@pytest.mark.parametrize("stop", [5, 8])
def test_resuming_gives_the_same_bytes_as_never_stopping(
    stop: int, dataset: Dataset, make_config: MakeConfig, tmp_path: Path
) -> None:
    straight = go(make_config(), dataset, tmp_path / "straight")
    go(make_config(), dataset, tmp_path / "resumed", stop_at=stop)
    resumed = go(make_config(), dataset, tmp_path / "resumed", resume=True)
    for name in ("model.safetensors", "checkpoint/weights.safetensors", "checkpoint/optimizer.safetensors"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name
    assert rows(tmp_path / "straight") == rows(tmp_path / "resumed")
    assert straight.progress.tokens == resumed.progress.tokens
    assert straight.progress.best_ndcg == resumed.progress.best_ndcg


def test_a_crash_between_checkpoints_repeats_the_lost_steps(
    dataset: Dataset, make_config: MakeConfig, tmp_path: Path
) -> None:
    def crash(report: Report) -> None:
        raise KeyboardInterrupt

    config = make_config(train={"max_steps": 12})
    go(config, dataset, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        go(config, dataset, tmp_path / "crashed", report=crash)  # at step 10; the last checkpoint is of step 9
    assert not (tmp_path / "crashed" / "run.json").exists()
    go(config, dataset, tmp_path / "crashed", resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "crashed")]
    assert weights[0] == weights[1]
    assert rows(tmp_path / "straight") == rows(tmp_path / "crashed")


def test_a_run_holds_what_its_readers_expect(dataset: Dataset, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    go(config, dataset, tmp_path / "run")
    run = open_run(tmp_path / "run")
    load_network(run)
    assert run.config == config
    assert run.info.data_hash == dataset.manifest.content_hash
    assert run.info.split_hash == dataset.manifest.split_hash
    assert (run.info.training_span, run.info.tie, run.info.clock) == ("any", dataset.manifest.tie, "unix")
    assert run.info.num_items == dataset.num_items
    assert run.info.longest_trained_history <= 32
    assert run.items.item_id == dataset.items.item_id
    assert not list((tmp_path / "run").rglob("*.new"))


def test_a_run_of_0_steps_is_a_random_model(dataset: Dataset, make_config: MakeConfig, tmp_path: Path) -> None:
    go(make_config(), dataset, tmp_path / "one", stop_at=0)
    go(make_config(), dataset, tmp_path / "two", stop_at=0)
    go(make_config().model_copy(update={"seed": 1}), dataset, tmp_path / "three", stop_at=0)
    one, two, three = (open_run(tmp_path / name).info.release_hash for name in ("one", "two", "three"))
    assert one == two != three
    load_network(open_run(tmp_path / "one"))
    assert rows(tmp_path / "one") == []


def test_an_item_bias_starts_in_the_order_of_popularity(
    dataset: Dataset, make_config: MakeConfig, tmp_path: Path
) -> None:
    go(make_config(model={"item_bias": "learned"}), dataset, tmp_path / "run", stop_at=0)
    bias = load_network(open_run(tmp_path / "run")).item_bias
    assert bias is not None
    counts = training_counts(dataset.histories, training_end(dataset, "any"), dataset.num_items)[1:]
    order = np.argsort(counts, kind="stable")
    assert np.all(np.diff(bias.numpy()[1:][order]) >= 0)
    assert bias[0] == 0


def test_a_taken_directory_is_refused(dataset: Dataset, make_config: MakeConfig, tmp_path: Path) -> None:
    go(make_config(), dataset, tmp_path / "run", stop_at=0)
    with pytest.raises(RunError, match="expected no such directory, found one"):
        go(make_config(), dataset, tmp_path / "run", stop_at=0)


def test_a_directory_that_cannot_be_made_is_refused(dataset: Dataset, make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="expected a directory that can be written"):
        go(make_config(), dataset, tmp_path / "file" / "run", stop_at=0)


def test_resuming_needs_a_run_of_the_same_config_and_data(
    dataset: Dataset, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="expected a run to resume, found none"):
        go(make_config(), dataset, tmp_path / "none", resume=True)
    go(make_config(), dataset, tmp_path / "run", stop_at=1)
    with pytest.raises(RunError, match="model differs from the config it was begun with"):
        go(make_config(model={"dim": 8}), dataset, tmp_path / "run", resume=True)
    other = prepared_dataset(tmp_path, lifelong_log(2, 20, 30))
    with pytest.raises(RunError, match="expected the data set it was begun on"):
        go(make_config(model={"side_features": ()}), other, tmp_path / "run", resume=True)
    (tmp_path / "renamed").mkdir()
    twin = prepared_dataset(tmp_path / "renamed", renamed(lifelong_log(2, 20, 30), "item_id"))
    go(make_config(model={"side_features": ()}), other, tmp_path / "other", stop_at=0)
    with pytest.raises(RunError, match="expected the data set it was begun on"):
        go(make_config(model={"side_features": ()}), twin, tmp_path / "other", resume=True)
    (tmp_path / "run" / "checkpoint" / "optimizer.safetensors").write_bytes(b"broken")
    with pytest.raises(RunError, match="expected a checkpoint of this config"):
        go(make_config(), dataset, tmp_path / "run", resume=True)


def test_training_lowers_the_loss_and_lifts_validation(
    dataset: Dataset, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        model={"dropout": 0.0}, train={"max_steps": 60, "validate_every": 30, "learning_rate": 1e-2, "patience": 100}
    )
    trained = go(config, dataset, tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    torch.manual_seed(config.seed)
    go(config, dataset, tmp_path / "random", stop_at=0)
    untrained = load_network(open_run(tmp_path / "random"))
    assert trained.progress.best_ndcg > Validation(dataset, config).ndcg(untrained, CPU, "auto", False)


@pytest.mark.parametrize("kind", ["full-softmax", "gbce"])
def test_every_loss_trains(kind: str, dataset: Dataset, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        model={"own_item_bias": False, "dropout": 0.0},
        loss={"kind": kind, "targets": "next-event"},
        train={"max_steps": 40, "learning_rate": 1e-2, "validate_every": 40},
    )
    go(config, dataset, tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0]


def test_the_best_weights_are_kept_and_patience_stops(
    dataset: Dataset, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.3, 0.2, 0.3])
    monkeypatch.setattr(Validation, "ndcg", lambda *_: next(scores))
    config = make_config(train={"max_steps": 100, "validate_every": 2, "patience": 2})
    trained = go(config, dataset, tmp_path / "run")
    assert (trained.progress.step, trained.progress.best_step, trained.progress.best_ndcg) == (8, 4, 0.3)
    assert trained.reason == "no better validation in 2"
    best = (tmp_path / "run" / "checkpoint" / "best.safetensors").read_bytes()
    last = (tmp_path / "run" / "checkpoint" / "weights.safetensors").read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == best != last


def test_a_wall_clock_stops_and_changes_nothing_before(
    dataset: Dataset, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(train={"max_steps": 10**6, "max_seconds": 0.3, "patience": 10**6})
    trained = go(config, dataset, tmp_path / "run")
    assert 0 < trained.progress.step < 10**6
    assert trained.reason == "train.max_seconds 0.3 used"
    whole = make_config(train={"max_steps": 10**6, "patience": 10**6})
    go(whole, dataset, tmp_path / "whole", stop_at=trained.progress.step)
    last = Path("checkpoint") / "weights.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_a_loss_that_is_no_number_is_refused(
    dataset: Dataset, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = torch.full((), torch.nan, requires_grad=True)
    monkeypatch.setattr("recsys_ksa.train.loop.batch_loss", lambda *_: nan * 1)
    with pytest.raises(RunError, match=r"the loss is nan at step 10. Lower train\.learning_rate"):
        go(make_config(), dataset, tmp_path / "run")


def test_bf16_on_the_cpu_is_refused(dataset: Dataset, make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision: expected float32 on cpu, got bf16"):
        go(make_config(train={"precision": "bf16"}), dataset, tmp_path / "run")


def test_an_ordinal_clock_switches_times_off(make_config: MakeConfig, tmp_path: Path) -> None:
    dataset = prepared_dataset(tmp_path, lifelong_log(3, 20, 30), arguments=["--clock", "ordinal"])
    config, said = resolve_config(make_config(model={"side_features": ()}), dataset)
    assert (config.model.use_gap, config.model.use_request_time) == (False, False)
    assert [line.split(" = ")[0] for line in said] == ["model.use_gap", "model.use_request_time"]
    go(config, dataset, tmp_path / "run", stop_at=2)
    assert open_run(tmp_path / "run").config.model.use_gap is False


def test_training_and_choosing_never_read_test_events(
    dataset: Dataset, make_config: MakeConfig, tmp_path: Path
) -> None:
    import dataclasses

    histories = dataset.histories
    items, times = histories.item_index.copy(), histories.timestamp.copy()
    for user in range(histories.num_users):
        first = min(int(histories.split["loo_test"][user]), int(histories.split["global_test"][user]))
        first = int(histories.offsets[user]) + min(first, max(histories.length(user) - 1, 0))
        items[first : histories.offsets[user + 1]] = 1
        times[first : histories.offsets[user + 1]] = times[first] + 10**7
    altered = dataclasses.replace(dataset, histories=dataclasses.replace(histories, item_index=items, timestamp=times))
    for name, data in (("honest", dataset), ("altered", altered)):
        go(make_config(), data, tmp_path / name)
    assert rows(tmp_path / "honest") == rows(tmp_path / "altered")
    assert np.array_equal(
        *(
            (np.frombuffer((tmp_path / name / "model.safetensors").read_bytes(), np.uint8))
            for name in ("honest", "altered")
        )
    )
