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
from ksa_kernels.catalogue_softmax import triton_log_z
from ksa_kernels.norm_rotary import triton_norm_rotary
from ksa_kernels.sigmoid_gate import triton_sigmoid_gate
from ksa_kernels.summary_append import triton_append
from ksa_kernels.summary_attention.triton_backward import columns_kernel, queries_kernel
from ksa_kernels.summary_attention.triton_forward import forward_kernel

RULE = dict(H=8, G=2, D=32, K=8, M=1, CAPPED=True, BLOCK_M=BLOCK, BLOCK_N=BLOCK, BLOCK_S=16, PRECISION="tf32")

TYPES = {"tiles_ptr": "*i32", "event_table_ptr": "*i32", "summary_table_ptr": "*i32"}
TYPES["scale"] = TYPES["eps"] = "fp32"
FLOATS = ("lse", "delta", "part", "log_z", "grad_ptr", "weight", "cos", "sin")

def type_of(name, more):
    if name in more or name in TYPES:
        return more.get(name) or TYPES[name]
    if name.endswith("_ptr"):
        return "*fp32" if any(word in name for word in FLOATS) else "*bf16"
    return "i32"

def compile(kernel, types={}, **constants):
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = type_of(name, types)
        if name.endswith(("_ptr", "_row", "_head")):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", ARCH, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2}).asm

keys_of_summaries, keys_of_events = {"SUMMARIES": True}, {"SUMMARIES": False}
on_keys = [(columns_kernel, keys_of_summaries), (columns_kernel, keys_of_events)]
on_queries = [(forward_kernel, {"SAME_STRIDES": FUSED, "STEADY": FUSED}), (queries_kernel, {"SAME_STRIDES": FUSED})]
for kernel, more in [*on_queries, *on_keys]:
    asm = compile(kernel, FUSED=FUSED, **RULE, **more)
    assert len(asm["cubin"]) > 1000
    assert ARCH != 90 or "wgmma" in asm["ptx"]

tile = dict(D=32, PRECISION="tf32", BLOCK_N=BLOCK)
rule = dict(H=8, G=2, K=8, M=1, CAPPED=True, EVENT_PAGE=16, SUMMARY_PAGE=16, QUERIES=8, ROWS=16)
for splits in (1, 4):
    compile(triton_append.append_kernel, {"count_ptr": "*i32"}, SPLITS=splits, **tile, **rule)
items = {"users_ptr": "*bf16"}
compile(triton_log_z.forward_kernel, items, BIASED=True, BLOCK_M=BLOCK, **tile)
compile(triton_log_z.gradient_kernel, items, BIASED=True, ROWS_ARE_USERS=FUSED, BLOCK_M=BLOCK, **tile)
for kernel in (triton_norm_rotary.forward_kernel, triton_norm_rotary.backward_kernel):
    compile(kernel, P=2, H=8, D=64, ROWS=64)
for kernel in (triton_sigmoid_gate.forward_kernel, triton_sigmoid_gate.backward_kernel):
    compile(kernel, E=512, WIDTH=512, TOKENS=8)
"""


@pytest.mark.parametrize(("arch", "block", "fused"), [(80, 32, False), (90, 64, True), (100, 32, True)])
def test_kernels_compile_ahead_of_time(arch, block, fused):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"ARCH, BLOCK, FUSED = {arch}, {block}, {fused}\n{SCRIPT}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
