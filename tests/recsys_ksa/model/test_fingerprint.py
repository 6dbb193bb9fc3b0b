"""What a user state and a release are identified by."""

import torch

from recsys_ksa.config import ModelConfig
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.fingerprint import appended_hash, release_hash, state_fingerprint
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


def test_appended_items_keep_the_state_fingerprint_and_have_a_hash_of_their_own() -> None:
    base = build()
    rows = base.embedding.tables.embeddings["item"].weight
    more = torch.cat([rows.detach(), torch.randn(3, rows.shape[1])])
    longer = Network(base.config, FeatureSchema(12)).eval()
    longer.load_state_dict({**base.state_dict(), "embedding.tables.embeddings.item.weight": more})
    assert state_fingerprint(longer) != state_fingerprint(base)
    assert state_fingerprint(longer, num_base_items=9) == state_fingerprint(base) == state_fingerprint(base, 9)
    assert state_fingerprint(longer, num_base_items=8) != state_fingerprint(base)
    assert release_hash(longer) != release_hash(base)
    appended = [appended_hash(longer, 9, stop) for stop in (9, 10, 11, 12)]
    assert len(set(appended)) == 4
    with torch.no_grad():
        longer.embedding.tables.embeddings["item"].weight[10] += 1
    again = [appended_hash(longer, 9, stop) for stop in (9, 10, 11, 12)]
    assert [a == b for a, b in zip(appended, again)] == [True, True, False, False]
    assert state_fingerprint(longer, num_base_items=9) == state_fingerprint(base)
    assert state_fingerprint(longer, num_base_items=11) != state_fingerprint(base)
