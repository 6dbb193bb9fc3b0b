import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ksa_kernels.errors import ShapeError
from ksa_kernels.sigmoid_gate import sigmoid_gate
from ksa_kernels.testing import error_budget, relative_error

HERE = Path(__file__).parent


def value_and_gradients(impl, shape, dtype=torch.float64, device="cpu", rounded=None):
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=generator).to(rounded or dtype).to(device, dtype)

    x, wide = draw(*shape).requires_grad_(), draw(shape[0], 2, *shape[1:]).requires_grad_()
    out = sigmoid_gate(x, wide[:, 1], impl=impl)
    return [out, *torch.autograd.grad((out * draw(*shape)).sum(), (x, wide))]


def check(impl, shape, dtype, device="cpu"):
    actual = value_and_gradients(impl, shape, dtype, device)
    expected = value_and_gradients("reference", shape, torch.float64, device, rounded=dtype)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == dtype
        assert relative_error(one, other) <= error_budget(dtype), (impl, shape)


def test_triton_equals_reference():
    pytest.importorskip("triton")
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch
from test_sigmoid_gate import check
from ksa_kernels.testing import nan_filled_empty
torch.set_num_threads(1)
with nan_filled_empty():
    for shape in ((0, 2, 16), (1, 1, 8), (70, 3, 16), (9, 4, 32)):
        check("triton", shape, torch.float32)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_torch_gives_the_formula():
    x, gate = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    assert torch.allclose(sigmoid_gate(x, gate), x / (1 + (-gate).exp()))


def test_tensors_that_disagree_are_refused():
    with pytest.raises(ShapeError, match=r"got \[3, 2, 4\] torch\.float32 and \[3, 1, 4\] torch\.float32"):
        sigmoid_gate(torch.zeros(3, 2, 4), torch.zeros(3, 1, 4))
