"""What a user state and a release are identified by."""

import torch

from recsys_ksa.config import ModelConfig
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.fingerprint import release_hash, state_fingerprint
from recsys_ksa.model.network import Network


def build(**changes: object) -> Network:
    torch.manual_seed(0)
    base = {"dim": 16, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "feed_forward_dim": 16}
    return Network(ModelConfig.model_validate(base | changes), FeatureSchema(9)).eval()


def test_equal_networks_have_equal_fingerprints() -> None:
    assert state_fingerprint(build()) == state_fingerprint(build())
    assert release_hash(build()) == release_hash(build())


def test_any_weight_that_rows_depend_on_changes_the_state_fingerprint() -> None:
    base, release = state_fingerprint(build()), release_hash(build())
    # The last block answers: of it, only keys, values and what they read matter to a state.
    answers_only = ("start", "norm.", "head.", "log_temperature", "request.", "blocks.1.output", "blocks.1.gain")
    answers_only += ("blocks.1.up", "blocks.1.down", "blocks.1.event.query_gain", "blocks.1.summary.query_gain")
    for name, _ in build().named_parameters():
        for at in (0, -1):
            network = build()
            with torch.no_grad():
                network.get_parameter(name).view(-1)[at] += 1e-3
            assert release_hash(network) != release, name
            of_queries = at == -1 and name in ("blocks.1.event.weight", "blocks.1.summary.weight")
            assert (state_fingerprint(network) == base) is (of_queries or name.startswith(answers_only)), (name, at)


def test_config_and_precision_change_the_state_fingerprint() -> None:
    base = state_fingerprint(build())
    assert state_fingerprint(build(window_chunks=3)) != base
    assert state_fingerprint(build().double()) != base
    network = build()
    network.precision = "bf16"
    assert state_fingerprint(network) != base
