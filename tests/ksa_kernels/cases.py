"""Random layouts, and both sides of a comparison."""

import random
from typing import Any, NamedTuple

import torch

from ksa_kernels import QKV, ChunkLayout, summary_attention
from ksa_kernels.testing import make_layout, make_qkv


class Case(NamedTuple):
    lengths: list[int]
    rule: dict[str, Any]
    num_heads: int
    num_kv_heads: int

    @property
    def layout(self) -> ChunkLayout:
        return make_layout(self.lengths, **self.rule)


def random_case(rng: random.Random, longest: int = 150, most_users: int = 5) -> Case:
    """Draw sizes, lengths around a chunk's, and half of the time queries on top of a state."""
    k = rng.choice([1, 2, 3, 4, 7, 16, 70])
    window = rng.choice([0, 1, 2, 3, 5, None])
    rule: dict[str, Any] = {
        "chunk_size": k,
        "summaries_per_chunk": rng.choice([0, 1, 1, 2, 3]),
        "window_chunks": window,
        "max_visible_chunks": rng.choice([None, None, 0, 1, 2, 5]),
    }
    if rng.random() < 0.3:
        rule["unseen_summaries"] = False
    lengths = [
        rng.choice([0, 1, k - 1, k, k + 1, rng.randint(0, longest), rng.randint(0, longest)])
        for _ in range(rng.randint(1, most_users))
    ]
    if rng.random() < 0.5:
        starts = [rng.randint(0, n) if rng.random() < 0.5 else max(0, n - rng.randint(0, 3)) for n in lengths]
        rule["query_start"] = starts
        if rng.random() < 0.7:
            rule["key_start"] = [
                0 if window is None else rng.randint(0, max(0, start // k - window)) * k for start in starts
            ]
    num_heads = rng.choice([1, 2, 4])
    return Case(lengths, rule, num_heads, rng.choice([j for j in (1, 2, 4) if num_heads % j == 0]))


def outputs_and_gradients(case: Case, impl: str, *, seed: int, head_dim: int = 4, dtype: torch.dtype = torch.float64):
    """Return the four outputs and the six gradients of a random weighting of all of them."""
    layout = case.layout
    events, summaries = make_qkv(
        layout,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        seed=seed,
        requires_grad=True,
    )
    out = summary_attention(events, summaries, layout, impl=impl)
    generator = torch.Generator().manual_seed(seed + 1)
    loss = sum((each * torch.randn(each.shape, generator=generator, dtype=torch.float64)).sum() for each in out)
    inputs = [*events, *summaries]
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return list(out), [torch.zeros_like(each) for each in inputs]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return list(out), [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


def outweighed(factor: float, dtype: torch.dtype, head_dim: int, window: int | None, device: str = "cpu", longest=230):
    """Return Triton's outputs and the reference's in float64 where old keys' scores dwarf those near the queries.

    Old keys are summaries or, without a window, events. Queries and keys are whole numbers, so that no rounding but the
    outputs' own tells the two apart.
    """
    rule = {"chunk_size": 4, "summaries_per_chunk": 1, "window_chunks": window}
    layout = Case([longest, 5], rule, 2, 1).layout.to(device)
    events, summaries = make_qkv(layout, num_heads=2, num_kv_heads=1, head_dim=head_dim, dtype=dtype)
    key = (events.key * 2).round()
    if window is None:
        key[: longest // 2] *= factor
    events = QKV(events.query.round(), key, events.value)
    summaries = QKV(summaries.query.round(), (summaries.key * 2).round() * factor, summaries.value)
    out = summary_attention(events, summaries, layout, impl="triton")
    exact = [QKV(*(each.double() for each in qkv)) for qkv in (events, summaries)]
    return list(out), list(summary_attention(*exact, layout, impl="reference"))
