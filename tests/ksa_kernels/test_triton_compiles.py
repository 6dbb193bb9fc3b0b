"""Every Triton kernel compiles ahead of time for the GPUs we name, without one here."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ksa_kernels.summary_attention.triton_backward import columns_kernel, queries_kernel
from ksa_kernels.summary_attention.triton_forward import forward_kernel

RULE = dict(H=8, G=2, D=32, K=8, M=1, CAPPED=True, BLOCK_M=BLOCK, BLOCK_N=BLOCK, BLOCK_S=16, PRECISION="tf32")

def pointer(name):
    if name == "users_ptr":
        return "*i64"
    if name == "tiles_ptr":
        return "*i32"
    return "*fp32" if "lse" in name or "delta" in name else "*bf16"

def compile(kernel, **constants):
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointer(name)
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name.endswith(("_ptr", "_row", "_head")):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", ARCH, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2}).asm

keys_of_summaries, keys_of_events = {"SUMMARIES": True}, {"SUMMARIES": False}
on_keys = [(columns_kernel, keys_of_summaries), (columns_kernel, keys_of_events)]
for kernel, more in [(forward_kernel, {}), (queries_kernel, {}), *on_keys]:
    asm = compile(kernel, FUSED=FUSED, **RULE, **more)
    assert len(asm["cubin"]) > 1000
    assert ARCH != 90 or "wgmma" in asm["ptx"]
"""


@pytest.mark.parametrize(("arch", "block", "fused"), [(80, 32, False), (90, 64, True), (100, 32, True)])
def test_kernels_compile_ahead_of_time(arch, block, fused):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"ARCH, BLOCK, FUSED = {arch}, {block}, {fused}\n{SCRIPT}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
