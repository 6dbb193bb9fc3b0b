import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ksa_kernels.errors import ShapeError
from ksa_kernels.norm_rotary import norm_rotary, norm_rotary_pair
from ksa_kernels.testing import error_budget, relative_error

HERE = Path(__file__).parent


def value_and_gradients(impl, shape, dtype=torch.float64, device="cpu", rounded=None, seed=0):
    """`shape`: T, P, H, D. The input is a view of a wider projection. `rounded`: what values are rounded to."""
    num_tokens, num_parts, num_heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, to=dtype):
        return torch.randn(size, generator=generator).to(rounded or dtype).to(device, to)

    wide = draw(num_tokens, num_parts + 1, num_heads, head_dim).requires_grad_()
    weight = draw(head_dim).requires_grad_()
    angle = draw(num_tokens, 1, head_dim // 2, to=torch.float64)
    cos = torch.cat((angle.cos(), angle.cos()), -1).to(torch.float32 if rounded is None else torch.float64)
    sin = torch.cat((-angle.sin(), angle.sin()), -1).to(cos.dtype)
    out = norm_rotary(
        wide[:, 1:], weight, cos.to(_at_least_float32(dtype)), sin.to(_at_least_float32(dtype)), impl=impl
    )
    return [out, *torch.autograd.grad((out * draw(*shape)).sum(), (wide, weight))]


def _at_least_float32(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def check(impl, shape, dtype, device="cpu"):
    actual = value_and_gradients(impl, shape, dtype, device)
    expected = value_and_gradients("reference", shape, torch.float64, device, rounded=dtype)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == dtype
        assert relative_error(one, other) <= error_budget(dtype), (impl, shape)


@pytest.mark.parametrize("shape", [(0, 1, 2, 16), (1, 1, 1, 16), (13, 2, 3, 6), (40, 3, 2, 32)])
def test_torch_equals_reference(shape):
    expected = value_and_gradients("reference", shape)
    for one, other in zip(value_and_gradients("torch", shape), expected, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_pair_equals_its_two_one_by_one(impl):
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 2, 3, 8), (9, 1, 6, 8))]
    weights = [torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in tensors]
    cos, sin = torch.randn(2, 9, 1, 8, dtype=torch.float64)
    together = norm_rotary_pair(*tensors, *weights, cos, sin, impl=impl)
    apart = [norm_rotary(x, w, cos, sin, impl="reference") for x, w in zip(tensors, weights)]
    for one, other in zip(together, apart, strict=True):
        assert relative_error(one, other) < 1e-12
    gradients = [
        torch.autograd.grad(sum((out * out.cos()).sum() for out in outs), [*tensors, *weights])
        for outs in (together, apart)
    ]
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-12


def test_a_turned_head_keeps_its_length_and_other_parts_pass():
    x, angle = torch.randn(5, 2, 3, 8), torch.randn(5, 1, 4)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    out = norm_rotary(x, torch.ones(8), cos, sin)
    assert torch.allclose(out[:, 0].norm(dim=-1), torch.full((5, 3), 8**0.5), atol=1e-4)
    assert torch.equal(out[:, 1], x[:, 1])


def test_triton_equals_reference():
    pytest.importorskip("triton")
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch
from test_norm_rotary import check
from ksa_kernels.testing import nan_filled_empty
torch.set_num_threads(1)
with nan_filled_empty():
    for shape in ((0, 1, 2, 16), (1, 1, 1, 16), (70, 2, 3, 16), (33, 1, 4, 32)):
        check("triton", shape, torch.float32)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("x", "weight", "cos", "message"),
    [
        ((3, 4, 8), (8,), (3, 1, 8), r"x must be \[T, P, H, D\].*got shape \[3, 4, 8\]"),
        ((3, 1, 4, 7), (7,), (3, 1, 7), r"D even"),
        ((3, 1, 4, 8), (4,), (3, 1, 8), r"weight must be \[D\] = \[8\]: got shape \[4\]"),
        ((3, 1, 4, 8), (8,), (2, 1, 8), r"cos must be \[T, 1, D\] = \[3, 1, 8\]: got \[2, 1, 8\]"),
    ],
)
def test_tensors_that_disagree_are_refused(x, weight, cos, message):
    with pytest.raises(ShapeError, match=message):
        norm_rotary(torch.zeros(x), torch.zeros(weight), torch.zeros(cos), torch.zeros(cos))
