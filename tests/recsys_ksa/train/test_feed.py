"""Whoever builds the inputs, training is fed the same ones in the same order, from any place on."""

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys_ksa.config import RunConfig, load_config
from recsys_ksa.data.dataset import Dataset, open_dataset
from recsys_ksa.data.negatives import NegativeSampler, training_counts
from recsys_ksa.data.spans import training_end
from recsys_ksa.data.training_batches import TrainingBatches
from recsys_ksa.errors import RunError
from recsys_ksa.train.feed import Builder, Feed, Place, Source, feed
from recsys_ksa.train.loop import train

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


def source_of(dataset: Dataset, config: RunConfig) -> Source:
    end = training_end(dataset, config.data.split)
    sampler = NegativeSampler(training_counts(dataset.histories, end, dataset.num_items), 0.5, config.seed)
    return Source(TrainingBatches(dataset.histories, end, config), sampler, 16)


def assert_same(found: Feed, expected: Feed) -> None:
    assert (found.next_epoch, found.next_position) == (expected.next_epoch, expected.next_position)
    assert torch.equal(found.negatives, expected.negatives)
    for holder, other in ((found.batch, expected.batch), (found.batch.own, expected.batch.own)):
        for field in dataclasses.fields(holder):  # type: ignore[arg-type]
            mine, theirs = getattr(holder, field.name), getattr(other, field.name)
            if isinstance(mine, torch.Tensor):
                assert torch.equal(mine, theirs), field.name


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_feed_what_a_thread_feeds_from_any_place_on(
    processes: int, dataset: Dataset, make_config: MakeConfig
) -> None:
    config = make_config(data={"stochastic_length": 1.6}, model={"calendar": ["hour"], "session_gap": 600})
    source = source_of(dataset, config)
    expected = list(islice(feed(source, Place(0, 0, 0), CPU), 12))
    assert {given.next_epoch for given in expected} != {0}  # an epoch ends in between
    third = expected[2]
    inputs = feed(source, Place(3, third.next_epoch, third.next_position), CPU, processes)
    for found, wanted in zip(islice(inputs, 9), expected[3:]):
        assert_same(found, wanted)
    inputs.close()  # type: ignore[attr-defined]


def test_what_goes_to_another_process_says_where_histories_are_mapped_not_what_is_in_them(
    dataset: Dataset, make_config: MakeConfig
) -> None:
    told = pickle.dumps(source_of(dataset, make_config()))
    assert dataset.histories.item_index[:50].tobytes() not in told
    copy = pickle.loads(told)
    assert_same(copy.build(Place(7, 1, 0)), source_of(dataset, make_config()).build(Place(7, 1, 0)))


@pytest.mark.parametrize(
    ("num_negatives", "pause", "said"),
    [
        (16, 0.0, "train.loader_processes: expected 1 to build batches, one ended: "),
        (1 << 20, 0.5, "exit code -9"),  # answers larger than a pipe: killed while it writes one
    ],
)
def test_a_process_that_dies_ends_training_with_the_reason(
    num_negatives: int,
    pause: float,
    said: str,
    dataset: Dataset,
    config_file: Callable[..., Path],
    make_config: MakeConfig,
) -> None:
    arguments = [dataset.path, config_file(make_config()), num_negatives, pause]
    found = said_within(300, "killed_builder", *arguments)
    assert said in found
    assert "Use fewer, or 0 for a thread." in found


def test_an_answer_that_breaks_off_is_the_end_of_its_process() -> None:
    """Killed while it writes the last one it was asked for; with a question unread the pipe says so by itself."""
    builder = Builder.__new__(Builder)
    builder._connection, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 1000) + b"half an answer")
    theirs.close()
    with pytest.raises(EOFError):
        builder.take()


def killed_builder(path: str, config_file: str, num_negatives: str, pause: str) -> None:
    """Print why feeding ends once the building process was killed; never returns where that goes unnoticed."""
    source = source_of(open_dataset(path), load_config(RunConfig, Path(config_file)))
    inputs = feed(dataclasses.replace(source, num_negatives=int(num_negatives)), Place(0, 0, 0), CPU, 1)
    next(inputs)
    time.sleep(float(pause))
    for child in multiprocessing.active_children():
        child.kill()
    try:
        list(islice(inputs, 20))
    except RunError as error:
        print(error)


def said_within(seconds: float, function: str, *arguments: object) -> str:
    """Return what a function of this file prints in a process of its own, which is ended, and failed, after a time."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])[sys.argv[2]](*sys.argv[3:])"
    command = [sys.executable, "-c", code, __file__, function, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            pytest.fail(f"{function} waits for a process that is dead")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_what_cannot_be_built_is_said_by_the_process(dataset: Dataset, make_config: MakeConfig) -> None:
    source = source_of(dataset, make_config())
    inputs = feed(source, Place(0, 0, source.batches.num_batches(0) + 1), CPU, 1)
    with pytest.raises(IndexError):
        next(inputs)


def test_training_says_how_long_it_waited_for_batches(
    dataset: Dataset, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    def slowly(*arguments: Any) -> Iterator[Feed]:
        for given in feed(*arguments):
            waits.append(0.1)
            time.sleep(0.1)
            yield given

    monkeypatch.setattr("recsys_ksa.train.loop.feed", slowly)
    config = make_config(train={"validate_every": 100})
    trained = train(config, dataset, tmp_path / "run", device=CPU)
    seconds = trained.progress.tokens / trained.speed.tokens_per_second
    assert trained.speed.waiting_share * seconds >= sum(waits[1:])
    assert trained.speed.waiting_share <= 1
    assert '"waiting_share"' in (tmp_path / "run" / "metrics.jsonl").read_text()
