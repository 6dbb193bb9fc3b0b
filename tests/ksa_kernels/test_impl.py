import pytest
import torch

from ksa_kernels.errors import ImplUnavailableError
from ksa_kernels.impl import Impl, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_triton_on_cuda_and_torch_elsewhere():
    assert resolve("auto", CUDA, torch.bfloat16) is Impl.TRITON
    assert resolve("auto", CPU, torch.bfloat16) is Impl.TORCH
    assert resolve("auto", CUDA, torch.float64) is Impl.TORCH
    assert resolve("auto", CUDA, torch.bfloat16, "its kernels take head dims (64,), got 24") is Impl.TORCH


def test_a_named_implementation_is_never_replaced():
    assert resolve("reference", CUDA, torch.float64) is Impl.REFERENCE
    with pytest.raises(ImplUnavailableError, match="needs a CUDA device, got tensors on cpu"):
        resolve("triton", CPU, torch.float32)
    with pytest.raises(ImplUnavailableError, match="float64"):
        resolve("triton", CUDA, torch.float64)
    with pytest.raises(ImplUnavailableError, match="cannot run: head dim 24 is odd"):
        resolve("triton", CUDA, torch.float32, "head dim 24 is odd")
    with pytest.raises(ImplUnavailableError, match="impl must be one of auto, reference, torch, triton: got 'cuda'"):
        resolve("cuda", CPU, torch.float32)
