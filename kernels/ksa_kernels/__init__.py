"""Attention kernels for recommenders that remember a whole life; torch and triton only."""

from ksa_kernels.layout import ChunkLayout
from ksa_kernels.summary_attention.api import QKV, AttentionOutput, summary_attention

__all__ = ["QKV", "AttentionOutput", "ChunkLayout", "summary_attention"]
