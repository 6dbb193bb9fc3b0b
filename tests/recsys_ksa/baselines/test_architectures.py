"""What must hold of every architecture: nothing looks ahead, users do not meet, and what keeps no state says so."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recsys_ksa.architectures import ARCHITECTURES, build_network
from recsys_ksa.baselines import padded
from recsys_ksa.baselines.chunk_tokens import MeanPooled
from recsys_ksa.baselines.hstu import time_buckets
from recsys_ksa.cli import call_verb, main
from recsys_ksa.config import ModelConfig, RunConfig, load_config
from recsys_ksa.data.assemble import questions_batch
from recsys_ksa.data.batches import Batch
from recsys_ksa.data.dataset import open_dataset
from recsys_ksa.errors import ConfigError, RunError
from recsys_ksa.evaluate.ksa_scorer import run_scorers
from recsys_ksa.evaluate.owned import Ownership
from recsys_ksa.evaluate.protocol import ask
from recsys_ksa.features import gap_buckets
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.recommender import Recommender
from recsys_ksa.run import load_network, load_scoring_network, open_run

BASELINES = [name for name in ARCHITECTURES if name != "ksa"]
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture(scope="module")
def dataset(tiny_data):
    return open_dataset(tiny_data)


def make_network(dataset, architecture: str, **change):
    config = ModelConfig(
        architecture=architecture, dim=16, num_heads=2, num_kv_heads=2, head_dim=8, feed_forward_dim=32, chunk_size=4,
        window_chunks=1, own_item_bias=True, use_event_type=False, **change,
    )  # fmt: skip
    features = FeatureSchema(dataset.num_items, len(dataset.vocab.get("event_type", ())), {}, "unix")
    return build_network(config, features).double().eval()


def random_batch(dataset, rng, users: int = 5) -> Batch:
    rows = rng.choice(dataset.histories.num_users, users, replace=False)
    question_user = np.repeat(np.arange(users), 3)
    lengths = dataset.histories.lengths[rows]
    cuts = np.concatenate([np.sort(rng.choice(length + 1, 3, replace=False)) for length in lengths])
    times = rng.integers(1_500_000_000, 1_700_000_000, len(cuts))
    return questions_batch(dataset.histories, rows, question_user, cuts, times, chunk_size=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_answer_depends_on_what_comes_after_it(architecture, dataset, rng):
    network = make_network(dataset, architecture)
    batch = random_batch(dataset, rng)
    asked = int(rng.integers(batch.num_questions))
    row, user = int(batch.question_row[asked]), int(batch.question_user[asked])
    later = torch.arange(batch.num_events)
    later = (later > row if row >= 0 else later >= batch.offsets[user]) & (later < batch.offsets[user + 1])
    changed = dataclasses.replace(
        batch,
        item_index=torch.where(later, batch.item_index % (dataset.num_items - 1) + 1, batch.item_index),
        gap_bucket=torch.where(later, (batch.gap_bucket + 3) % 40, batch.gap_bucket),
        timestamp=batch.timestamp + later * 10**6,
        request_bucket=torch.where(
            torch.arange(batch.num_questions) == asked, batch.request_bucket, (batch.request_bucket + 5) % 40
        ),
    )
    with torch.no_grad():
        torch.testing.assert_close(network(batch)[asked], network(changed)[asked], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", BASELINES)
def test_a_planted_look_ahead_is_caught(architecture, dataset, rng, monkeypatch):
    """The test above fails for a network that sees one event too many."""
    monkeypatch.setattr("recsys_ksa.baselines.hstu.causal", _one_ahead)
    monkeypatch.setattr("recsys_ksa.baselines.sasrec.attend", _attend_one_ahead)
    monkeypatch.setattr("recsys_ksa.baselines.chunk_tokens.ChunkTokenNetwork._visible",
                        lambda network, pack, token_chunk: _one_ahead(pack, len(token_chunk)))  # fmt: skip
    network = make_network(dataset, architecture)
    users = np.array([int(np.argmax(dataset.histories.lengths))])
    batch = questions_batch(dataset.histories, users, np.zeros(2, int), np.array([9, 12]), chunk_size=4)
    changed = dataclasses.replace(batch, item_index=batch.item_index.clone())
    changed.item_index[9] = batch.item_index[9] % (dataset.num_items - 1) + 1
    with torch.no_grad():
        assert not torch.allclose(network(batch)[0], network(changed)[0], rtol=1e-6)


def _attend_one_ahead(*heads: torch.Tensor) -> torch.Tensor:
    size = heads[0].shape[2]
    return padded.attend(*heads, torch.ones(1, size, size, dtype=torch.bool).tril(1))


def _one_ahead(pack: padded.Pack, tokens: int = 0) -> torch.Tensor:
    size = pack.row.shape[1] + tokens
    return torch.ones(size, size, dtype=torch.bool).tril(1).expand(len(pack.row), -1, -1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_equals_its_users_one_by_one(architecture, dataset, rng, monkeypatch):
    network = make_network(dataset, architecture)
    rows = rng.choice(dataset.histories.num_users, 6, replace=False)
    cuts = dataset.histories.lengths[rows]
    times = np.full(6, 1_700_000_000)
    batch = questions_batch(dataset.histories, rows, np.arange(6), cuts, times, chunk_size=4)
    with torch.no_grad():
        together = network(batch)
        monkeypatch.setattr(padded, "MAX_PAIRS", {"cpu": 1})
        for at in range(6):
            alone = questions_batch(dataset.histories, rows[[at]], np.zeros(1, int), cuts[[at]], times[[at]],
                                    chunk_size=4)  # fmt: skip
            torch.testing.assert_close(network(alone)[0], together[at], rtol=1e-9, atol=1e-9)


def test_packs_hold_every_event_once_and_little_padding(rng, monkeypatch):
    monkeypatch.setattr(padded, "MAX_PAIRS", {"cpu": 10_000})
    lengths = torch.from_numpy(rng.integers(0, 130, 60))
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    times = torch.arange(int(offsets[-1]))
    batch = SimpleNamespace(offsets=offsets, first_position=torch.zeros(60, dtype=torch.int64), timestamp=times)
    packs = list(padded.packs(batch))
    rows = torch.cat([pack.row[pack.is_event] for pack in packs])
    assert torch.equal(rows.sort().values, times)
    for pack in packs:
        users, longest = pack.row.shape
        assert users == 1 or users * longest**2 <= 10_000
        assert 2 * int(pack.is_event.sum(1).min()) >= longest


@pytest.mark.parametrize("architecture", BASELINES)
def test_every_parameter_learns_and_padding_is_no_number_that_spreads(architecture, dataset, rng):
    network = make_network(dataset, architecture).train()
    users = np.argsort(dataset.histories.lengths)[[0, -1, -2]]
    batch = questions_batch(dataset.histories, users, np.arange(3), dataset.histories.lengths[users],
                            np.full(3, 1_700_000_000), chunk_size=4)  # fmt: skip
    items = torch.from_numpy(rng.integers(1, dataset.num_items, 3))
    (network(batch) * network.item_vectors(items)).sum().backward()
    for name, parameter in network.named_parameters():
        if name.startswith(("own_items.", "start", "log_temperature")):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_mean_knows_no_order_and_a_window_that_holds_all_needs_none(dataset, rng):
    """Events of a chunk beyond the stacked window trade places: the answer stays; within the window it does not."""
    network = make_network(dataset, "mean-pooled")
    user = np.array([int(np.argmax(dataset.histories.lengths))])
    cut = np.array([30])
    batch = questions_batch(dataset.histories, user, np.zeros(1, int), cut, chunk_size=4)
    inputs = {"item_index": batch.item_index, "gap_bucket": batch.gap_bucket}

    def swapped(first: int, second: int) -> torch.Tensor:
        order = torch.arange(30)
        order[[first, second]] = order[[second, first]]
        with torch.no_grad():
            return network(dataclasses.replace(batch, **{name: value[order] for name, value in inputs.items()}))

    with torch.no_grad():
        plain = network(batch)
    torch.testing.assert_close(plain, swapped(0, 3), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain, swapped(26, 28), rtol=1e-6)
    old = dataclasses.replace(batch, item_index=batch.item_index.clone())
    old.item_index[1] = old.item_index[1] % (dataset.num_items - 1) + 1
    with torch.no_grad():
        assert not torch.allclose(plain, network(old), rtol=1e-6)


def test_a_chunk_has_one_mean(dataset):
    with pytest.raises(ConfigError, match="one mean"):
        make_network(dataset, "mean-pooled", summaries_per_chunk=2)
    assert make_network(dataset, "segment-tokens", summaries_per_chunk=2)
    assert isinstance(make_network(dataset, "mean-pooled"), MeanPooled)


def test_time_buckets_equal_those_of_event_gaps(rng):
    seconds = np.concatenate((np.array([-5, 0, 1, 2, 2**30 - 1, 2**30, 2**45]), rng.integers(0, 2**40, 1000)))
    assert time_buckets(torch.from_numpy(seconds)).tolist() == gap_buckets(seconds).tolist()


@pytest.mark.parametrize("architecture", BASELINES)
def test_it_is_trained_and_evaluated_like_any_run_and_refuses_the_rest(architecture, tiny_data, tmp_path, dataset):
    run = tmp_path / architecture
    config = CONFIGS / "baselines" / f"{architecture}.toml"
    command = [str(config), "--data", str(tiny_data), "--out", str(run), "--steps", "2", "--set",
               "model.side_features=[]", "--set", "model.window_chunks=1"]  # fmt: skip
    call_verb("train", command)
    network = load_scoring_network(open_run(run))
    questions = ask(dataset.histories, "global")
    (scorer,) = run_scorers(architecture, network, dataset, questions, Ownership(dataset.histories), ["drawn"])
    assert scorer.scores(questions).isfinite().all()
    for refused in (lambda: Recommender.load(run), lambda: load_network(open_run(run))):
        with pytest.raises(RunError, match=f"{architecture}, which is for comparison and keeps no user state"):
            refused()
    assert main(["index", str(run)]) == 2


def test_a_report_of_one_says_that_it_keeps_no_state(tiny_data, tiny_run, tmp_path, capsys):
    """Evaluated as the main run, beside a run of the network: no truncated form, no stored summaries, no KB."""
    run = tmp_path / "hstu"
    config = str(CONFIGS / "baselines" / "hstu.toml")
    call_verb("train", [config, "--data", str(tiny_data), "--out", str(run), "--steps", "0", "--set",
                        "model.side_features=[]"])  # fmt: skip
    call_verb("evaluate", [str(run), "--data", str(tiny_data), "--compare", str(tiny_run), "--protocol", "loo",
                           "--baselines", "popularity", "--request-time", "drawn", "--tracking", "none"])  # fmt: skip
    rows = json.loads((run / "evaluation" / "loo" / "rows.json").read_text())
    assert {row["model"] for row in rows if "-minus-" not in row["model"]} == {"ksa", "smoke", "popularity"}
    printed = capsys.readouterr().out
    assert "keeps no state" in printed
    assert "ksa-zeroed: left out: the run keeps no summaries" in printed
    call_verb("report", [str(run), "--out", str(tmp_path / "report"), "--tracking", "none"])
    assert "architecture hstu" in (tmp_path / "report" / "report.md").read_text()


def test_positions_of_its_own_bound_what_is_trained_on_and_read(tiny_data, tmp_path, dataset):
    short = ["--set", "model.max_positions=64", "--set", "model.side_features=[]", "--steps", "0"]
    command = [str(CONFIGS / "baselines" / "sasrec.toml"), "--data", str(tiny_data), *short]
    with pytest.raises(ConfigError, match=r"max_positions 64.*got 512"):
        call_verb("train", [*command, "--out", str(tmp_path / "long")])
    run = tmp_path / "short"
    call_verb("train", [*command, "--out", str(run), "--set", "data.max_length=64"])
    network = load_scoring_network(open_run(run))
    questions = ask(dataset.histories, "loo")
    (scorer,) = run_scorers("sasrec", network, dataset, questions, Ownership(dataset.histories), ["none"])
    (same,) = run_scorers("sasrec", network, dataset, questions, Ownership(dataset.histories), ["none"], max_length=64)
    assert torch.equal(scorer.vectors, same.vectors)


@pytest.mark.parametrize("architecture", BASELINES)
def test_a_baseline_has_the_budget_of_the_main_job(architecture):
    """Same data, loss and training; of the model only what the architecture is."""
    ours = load_config(RunConfig, CONFIGS / "complete-journey" / "ksa.toml")
    theirs = load_config(RunConfig, CONFIGS / "baselines" / f"{architecture}.toml")
    assert (theirs.data, theirs.loss, theirs.train, theirs.evaluate) == (
        ours.data,
        ours.loss,
        ours.train,
        ours.evaluate,
    )
    same = {"architecture", "max_positions", *({"use_gap", "use_request_time"} if architecture == "sasrec" else ())}
    assert theirs.model.model_dump(exclude=same) == ours.model.model_dump(exclude=same)
