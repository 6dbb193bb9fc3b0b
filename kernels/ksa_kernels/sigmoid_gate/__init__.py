"""A gate on attention's output: x * sigmoid(gate), in one pass."""

from ksa_kernels.sigmoid_gate.api import sigmoid_gate

__all__ = ["sigmoid_gate"]
