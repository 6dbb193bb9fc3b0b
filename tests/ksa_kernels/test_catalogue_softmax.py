import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ksa_kernels.catalogue_softmax import catalogue_log_z, torch_blocked
from ksa_kernels.errors import ShapeError
from ksa_kernels.testing import error_budget, relative_error

HERE = Path(__file__).parent


def value_and_gradients(impl, num_users, num_items, dim, biased, dtype=torch.float64, device="cpu", rounded=None):
    """`rounded`: the dtype that the inputs' values are rounded to, if not `dtype`."""
    generator = torch.Generator().manual_seed(num_users)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(rounded or dtype).to(device, dtype)

    users, items = (draw(n, dim).requires_grad_() for n in (num_users, num_items))
    bias = draw(num_items).requires_grad_() if biased else None
    out = catalogue_log_z(users, items, bias, impl=impl)
    weights = draw(num_users).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), [users, items] if bias is None else [users, items, bias])]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_users", "num_items"), [(1, 1), (7, 100), (40, 33), (0, 5)])
def test_torch_equals_reference(num_users, num_items, biased, monkeypatch):
    monkeypatch.setattr(torch_blocked, "USERS_AT_ONCE", 9)
    monkeypatch.setattr(torch_blocked, "ITEMS_AT_ONCE", 7)
    expected = value_and_gradients("reference", num_users, num_items, 9, biased)
    actual = value_and_gradients("torch", num_users, num_items, 9, biased)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < 1e-12


def test_memory_does_not_grow_with_users_times_items(monkeypatch):
    monkeypatch.setattr(torch_blocked, "ITEMS_AT_ONCE", 20)
    users, items = torch.randn(50, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        catalogue_log_z(users, items)
    assert sum(kept) <= 50 * 4 + 300 * 4 + 50 + 300


def test_triton_equals_reference():
    pytest.importorskip("triton")
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch
from test_catalogue_softmax import check
for sizes in ((1, 1, 16, False), (70, 150, 16, True), (30, 200, 17, True)):
    check(*sizes)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def check(num_users, num_items, dim, biased):
    expected = value_and_gradients("reference", num_users, num_items, dim, biased, torch.float32)
    actual = value_and_gradients("triton", num_users, num_items, dim, biased, torch.float32)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) <= error_budget(torch.float32) or float((one - other).norm()) < 1e-6


@pytest.mark.parametrize(
    ("users", "items", "bias", "message"),
    [
        ((3, 4), (5, 6), None, r"must share D.*got \[3, 4\] and \[5, 6\]"),
        ((3, 4), (0, 4), None, r"I >= 1"),
        ((3, 4), (5, 4), (4,), r"log_popularity must be \[5\]: got \[4\]"),
    ],
)
def test_tensors_that_disagree_are_refused(users, items, bias, message):
    offset = None if bias is None else torch.zeros(bias)
    with pytest.raises(ShapeError, match=message):
        catalogue_log_z(torch.zeros(users), torch.zeros(items), offset)


def test_a_foreign_dtype_is_refused():
    with pytest.raises(ShapeError, match=r"torch\.float32, cpu: got torch\.float64, cpu"):
        catalogue_log_z(torch.zeros(3, 4), torch.zeros(5, 4).double())
