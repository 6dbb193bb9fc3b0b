"""Processes that train together end where one would that has all their batches, also when they stop in between."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recsys_ksa.architectures import build_network
from recsys_ksa.cli import call_verb
from recsys_ksa.config import RunConfig, load_config
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.data.negatives import NegativeSampler, training_counts
from recsys_ksa.data.spans import training_end
from recsys_ksa.data.training_batches import TrainingBatches
from recsys_ksa.errors import RunError
from recsys_ksa.model.losses import batch_loss
from recsys_ksa.model.popularity import Centre
from recsys_ksa.run import open_run
from recsys_ksa.train.feed import Place, Source
from recsys_ksa.train.loop import train
from recsys_ksa.train.optim import learning_rate, make_optimizer
from recsys_ksa.train.ranks import joined_ranks
from recsys_ksa.train.run_files import feature_schema

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
STEPS = 6


def together(processes: int, *command: object) -> str:
    """Return what a Python command prints that torchrun starts in several processes; fail where it does not end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [*torchrun, "--no-python", sys.executable, *map(str, command)]
    told = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=told, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


def weights_by_union(config: RunConfig, dataset: Dataset, world_size: int) -> dict[str, torch.Tensor]:
    """Train alone on all processes' batches of each step: the mean over all their questions."""
    torch.manual_seed(config.seed)
    network = build_network(config.model, feature_schema(dataset, config)).train()
    optimizer = make_optimizer(network, config.train)
    end = training_end(dataset, config.data.split)
    sampler = NegativeSampler(
        training_counts(dataset.histories, end, dataset.num_items), config.loss.popularity_power, config.seed
    )
    sources = [
        Source(
            TrainingBatches(dataset.histories, end, config, rank=rank, world_size=world_size),
            sampler,
            config.loss.num_negatives,
        )
        for rank in range(world_size)
    ]
    for place in islice(sources[0].places(Place(0, 0, 0)), STEPS):
        given = [source.build(place) for source in sources]
        total = sum(each.batch.num_questions for each in given)
        optimizer.zero_grad()
        for each in given:
            users = network(each.batch)
            loss = batch_loss(network, users, each.batch, config.loss, each.negatives, sampler.log_probability)
            (loss * each.batch.num_questions / total).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.train.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, place.step) * group["scale"]
        optimizer.step()
    return network.state_dict()


def test_processes_end_where_one_with_all_their_batches_does(
    dataset: Dataset, make_config: MakeConfig, config_file: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config(
        model={"dropout": 0.0, "own_item_bias": False},
        loss={"kind": "sampled-softmax"},
        train={"max_steps": STEPS, "validate_every": 100, "checkpoint_every": 2},
    )
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['train_together'](*sys.argv[2:])"
    together(2, "-c", code, __file__, dataset.path, config_file(config), tmp_path)

    expected = weights_by_union(config, dataset, 2)
    straight, resumed = (load_file(tmp_path / name / "checkpoint" / "weights.safetensors") for name in ("a", "b"))
    for name, value in expected.items():
        torch.testing.assert_close(straight[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(resumed[name], straight[name]), name
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("a", "b")
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    open_run(tmp_path / "a")
    with pytest.raises(RunError, match="expected to go on with as many processes as it was begun with, 2, got 1"):
        train(config, dataset, tmp_path / "b", device=CPU, resume=True)


def train_together(path: str, config_file: str, folder: str) -> None:
    """Train straight into a, and into b with a stop in between; check what a running mean is of."""
    dataset, config = open_dataset(path), load_config(RunConfig, Path(config_file))
    with joined_ranks() as ranks:
        trained = train(config, dataset, Path(folder) / "a", device=CPU, ranks=ranks)
        train(config, dataset, Path(folder) / "b", device=CPU, ranks=ranks, stop_at=3)
        train(config, dataset, Path(folder) / "b", device=CPU, ranks=ranks, resume=True)

        batches = TrainingBatches(dataset.histories, training_end(dataset, config.data.split), config, world_size=2)
        assert trained.progress.tokens > batches.batch(0, 0).num_events * STEPS  # of both processes
        vectors = torch.arange(21.0).view(7, 3)
        centre = Centre(3).train()
        centre(vectors[:2] if ranks.is_first else vectors[2:])
        mean, alone = centre.mean.clone(), vectors.mean(0)
    whole = Centre(3).train()
    whole(vectors)
    torch.testing.assert_close(mean, whole.mean)
    assert not torch.allclose(mean, torch.zeros(3)), alone


def test_the_command_runs_in_several_processes(
    dataset: Dataset, make_config: MakeConfig, config_file: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config(
        model={"item_bias": "popularity-7d"}, train={"max_steps": 4, "validate_every": 2, "max_seconds": 1000.0}
    )
    code = "import sys; from recsys_ksa.cli import main; sys.exit(main(sys.argv[1:]))"
    run = tmp_path / "run"
    said = together(2, "-c", code, "train", config_file(config), "--data", dataset.path, "--out", run)
    assert said.count("4 steps done") == 1
    call_verb("index", [str(run)])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "valid_ndcg@10" in row] == [2, 4]
