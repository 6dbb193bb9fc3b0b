"""Whoever builds the inputs, training is fed the same ones in the same order, from any place on."""

import dataclasses
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys_ksa.config import RunConfig
from recsys_ksa.data.dataset import Dataset
from recsys_ksa.data.negatives import NegativeSampler, training_counts
from recsys_ksa.data.spans import training_end
from recsys_ksa.data.training_batches import TrainingBatches
from recsys_ksa.errors import RunError
from recsys_ksa.train.feed import Feed, Place, Source, feed
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


def test_a_process_that_dies_ends_training_with_the_reason(dataset: Dataset, make_config: MakeConfig) -> None:
    inputs = feed(source_of(dataset, make_config()), Place(0, 0, 0), CPU, 1)
    next(inputs)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(
        RunError, match=r"train.loader_processes: expected 1 to build batches, one ended: .*Use fewer, or 0"
    ):
        list(islice(inputs, 20))


def test_a_process_that_dies_half_way_through_an_answer_ends_training(
    dataset: Dataset, make_config: MakeConfig
) -> None:
    """Answers larger than a pipe: killed while it writes one, the process must not be waited for."""
    source = dataclasses.replace(source_of(dataset, make_config()), num_negatives=1 << 20)
    inputs = feed(source, Place(0, 0, 0), CPU, 1)
    next(inputs)
    time.sleep(0.5)  # the next answer fills the pipe
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(RunError, match="exit code -9"):
        list(islice(inputs, 20))


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
