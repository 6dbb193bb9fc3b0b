"""The Triton kernels on a CUDA device. kernels/benchmarks/verify.py draws more cases and needs no pytest."""

import random

import pytest
import torch

from ksa_kernels import summary_attention
from ksa_kernels.errors import ImplUnavailableError
from ksa_kernels.testing import error_budget, make_qkv, nan_filled_empty, relative_error

from .cases import Case, outweighed, random_case
from .test_catalogue_softmax import value_and_gradients
from .test_norm_rotary import check as check_norm_rotary
from .test_sigmoid_gate import check as check_sigmoid_gate
from .test_summary_append import check as check_append

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(case, impl, dtype, head_dim):
    layout = case.layout.to("cuda")
    shape = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads, "head_dim": head_dim}
    rounded = make_qkv(layout, dtype=dtype, **shape)
    kept = torch.float64 if impl == "reference" else dtype
    inputs = [each.to(kept).requires_grad_() for qkv in rounded for each in qkv]
    out = summary_attention(type(rounded[0])(*inputs[:3]), type(rounded[1])(*inputs[3:]), layout, impl=impl)
    generator = torch.Generator().manual_seed(2)
    loss = sum((each * torch.randn(each.shape, generator=generator).to(each)).sum() for each in out)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [*out, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_triton_equals_reference(dtype, head_dim):
    rng = random.Random(head_dim)
    for _ in range(2):
        case = random_case(rng, longest=400)
        expected = run(case, "reference", dtype, head_dim)
        with nan_filled_empty():
            actual = run(case, "triton", dtype, head_dim)
        for one, other in zip(actual, expected, strict=True):
            if other.norm() > 0:
                assert relative_error(one, other) <= error_budget(dtype), case


def test_a_long_history_beside_short_ones():
    rule = {"chunk_size": 8, "summaries_per_chunk": 1, "window_chunks": 32, "max_visible_chunks": None}
    case = Case([0, 1, 7, 8, 9, 20_000], rule, 2, 2)
    layout = case.layout.to("cuda")
    events, summaries = make_qkv(layout, num_heads=2, head_dim=64, dtype=torch.bfloat16)
    out = summary_attention(events, summaries, layout, impl="triton")
    expected = summary_attention(events, summaries, layout, impl="torch")
    for one, other in zip(out, expected, strict=True):
        assert relative_error(one, other) <= error_budget(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [1, None])
def test_old_keys_may_outweigh_recent_ones_by_any_factor(window, dtype):
    for head_dim in (32, 64, 128):
        for factor in (1, 8, 128):
            out, expected = outweighed(factor, dtype, head_dim, window, "cuda", longest=2000)
            for one, other in zip(out, expected, strict=True):
                assert relative_error(one, other) <= error_budget(dtype), (head_dim, factor)


def test_equal_inputs_give_equal_gradients():
    case = Case([3000, 500], {"chunk_size": 8, "summaries_per_chunk": 1, "window_chunks": 4}, 4, 2)
    once, again = (run(case, "triton", torch.bfloat16, 64) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_reads_pages_in_place(dtype, rng):
    for _ in range(4):
        check_append(rng, "triton", 900, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 16, False), (300, 1000, 64, True), (70, 5000, 129, True)])
def test_the_catalogues_normaliser_equals_reference(sizes, dtype):
    actual = value_and_gradients("triton", *sizes, dtype, "cuda")
    expected = value_and_gradients("reference", *sizes, torch.float64, "cuda", rounded=dtype)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) <= error_budget(dtype) or float(other.norm()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norm_rotary_and_gate_equal_reference(dtype):
    for shape in ((1, 1, 1, 16), (1000, 2, 3, 32), (777, 1, 8, 64)):
        check_norm_rotary("triton", shape, dtype, "cuda")
    for shape in ((1, 1, 8), (1000, 3, 32), (777, 8, 64)):
        check_sigmoid_gate("triton", shape, dtype, "cuda")


def test_torch_compile_takes_the_operator_whole():
    case = Case([300, 40], {"chunk_size": 8, "summaries_per_chunk": 1, "window_chunks": 4}, 2, 2)
    layout = case.layout.to("cuda")
    inputs = make_qkv(layout, num_heads=2, head_dim=64, dtype=torch.bfloat16)

    def run(events, summaries):
        return summary_attention(events, summaries, layout, impl="triton").events

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), run(*inputs))


def test_head_dims_without_kernels_are_refused():
    case = Case([40], {"chunk_size": 8, "summaries_per_chunk": 1, "window_chunks": 1}, 1, 1)
    layout = case.layout.to("cuda")
    inputs = make_qkv(layout, num_heads=1, head_dim=24, dtype=torch.float32)
    with pytest.raises(ImplUnavailableError, match="head dims"):
        summary_attention(*inputs, layout, impl="triton")
