"""The Triton kernels on the CPU, by Triton's interpreter, in a process of their own (the switch is read at import).

float32 only: the interpreter's bf16 product is wrong.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent

SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import random, torch
from cases import Case, outputs_and_gradients, random_case
from ksa_kernels import summary_attention
from ksa_kernels.testing import error_budget, make_qkv, nan_filled_empty, relative_error

torch.set_num_threads(1)

def check(case, head_dim=16):
    expected = outputs_and_gradients(case, "reference", seed=1, head_dim=head_dim, dtype=torch.float32)
    with nan_filled_empty():
        actual = outputs_and_gradients(case, "triton", seed=1, head_dim=head_dim, dtype=torch.float32)
    for name, actual_part, expected_part in zip(["output", "gradient"], actual, expected):
        for i, (one, other) in enumerate(zip(actual_part, expected_part)):
            error = relative_error(one, other) if other.norm() else float(one.norm())
            assert error <= error_budget(torch.float32), (name, i, error, case)

{body}
"""


def run_interpreted(body: str) -> None:
    script = SCRIPT.format(here=str(HERE), body=body)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("seed", [5, 11])
def test_triton_equals_reference_forward_and_backward(seed):
    run_interpreted(f"rng = random.Random({seed})\nfor _ in range(4):\n    check(random_case(rng, 45, 2))")


def test_triton_takes_every_edge_length_in_one_batch():
    rule = {"chunk_size": 8, "summaries_per_chunk": 2, "window_chunks": 1, "max_visible_chunks": 4}
    run_interpreted(f"check(Case([0, 1, 7, 8, 9, 60], {rule}, 2, 1))")


def test_triton_chunks_longer_than_a_tile():
    rule = {"chunk_size": 70, "summaries_per_chunk": 3, "window_chunks": 0, "query_start": [65], "key_start": [0]}
    run_interpreted(f"check(Case([145], {rule}, 1, 1))")


def test_a_tile_may_begin_in_a_chunk_that_closed_before_the_first_query():
    """Its summaries do not ask: the row where they would be written is the user's before."""
    rule = {"chunk_size": 70, "summaries_per_chunk": 2, "window_chunks": 1}
    starts = {"query_start": [69, 140], "key_start": [0, 0]}
    run_interpreted(f"check(Case([145, 141], {rule | starts}, 1, 1))")


def test_old_keys_may_outweigh_recent_ones_by_far():
    run_interpreted(
        """
from cases import outweighed
for window in (1, None):
    out, expected = outweighed(3000, torch.float32, 16, window, longest=100)
    errors = [relative_error(one, other) for one, other in zip(out, expected)]
    assert max(errors) <= error_budget(torch.float32), (window, errors)
"""
    )


def test_the_operator_passes_torchs_own_checks_and_compiles_whole():
    run_interpreted(
        """
from ksa_kernels.summary_attention import triton_op as op
from ksa_kernels.summary_attention.triton_tiles import tiles
layout = Case([5, 21], {"chunk_size": 4, "summaries_per_chunk": 1, "window_chunks": 1}, 2, 1).layout
events, summaries = make_qkv(layout, num_heads=2, num_kv_heads=1, dtype=torch.float32, requires_grad=True)
maps = [tiles(layout, kind, 32) for kind in ("queries", "queries", "events", "summaries")]
arguments = (*events, *summaries, maps, 4, 1, 1, -1)
checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
torch.library.opcheck(op.summary_attention_op, arguments, test_utils=checks)


from ksa_kernels import impl
impl._interpreting = lambda: True  # dynamo does not trace Triton's own switches

def run(events, summaries):
    return summary_attention(events, summaries, layout, impl="triton").events

expected = run(events, summaries)
compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(events, summaries), expected)
"""
    )
