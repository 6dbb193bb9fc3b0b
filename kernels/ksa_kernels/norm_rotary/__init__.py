"""RMS norm and rotary positions of a projection's heads, in one pass."""

from ksa_kernels.norm_rotary.api import norm_rotary, norm_rotary_pair

__all__ = ["norm_rotary", "norm_rotary_pair"]
