"""The formulas of `block.py` in NumPy, for a handful of tokens on a CPU.

With so few numbers it is calling an operator that takes the time, and NumPy is called in a third of torch's. The arrays
are the parameters' own memory. No gradients, no dropout; float32 or float64.

Letters: T tokens, E model dim, H heads, J key and value heads, D head dim, L keys.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ksa_kernels.rms_norm import EPS
from recsys_ksa.model.block import Block, Projection
from recsys_ksa.model.rotary import BASE

Array = NDArray[np.floating]
ArrayRotary = tuple[Array, Array]
"""(cos [T, 1, 1, D / 2], signed sin [T, 1, 2, D / 2]); see `recsys_ksa.model.rotary.Rotary`."""

LARGE = 1 << 18
"""Multiplications in a product of matrices beyond which torch computes it: from there on NumPy's own threads would take
part, and they keep a core busy while they wait."""


class ArrayProjection(NamedTuple):
    """`Projection`: queries, gates, keys and values of one kind of token."""

    num_heads: int
    num_kv_heads: int
    gain: Array
    weight: Array
    key_gain: Array
    query_gain: Array

    @classmethod
    def of(cls, projection: Projection) -> Self:
        """Return the projection as NumPy sees it."""
        p = projection
        return cls(p.num_heads, p.num_kv_heads, *map(array_of, (p.gain, p.weight, p.key_gain, p.query_gain)))

    def __call__(self, x_TE: Array, rotary: ArrayRotary) -> tuple[Array, Array, Array]:
        """Return queries [T, H, D], what the output's gate opens by [T, H, D], and rows [T, 2, J, D]."""
        heads, scale = self._heads(x_TE, self.weight)
        rows = 2 * self.num_kv_heads
        return *self._queries(heads[:, rows:], scale[:, rows:], rotary), self._rows(heads[:, :rows], scale, rotary)

    def queries(self, x_TE: Array, rotary: ArrayRotary) -> tuple[Array, Array]:
        """Return queries and gates alone."""
        columns = self.weight[:, 2 * self.num_kv_heads * len(self.key_gain) :]
        return self._queries(*self._heads(x_TE, columns), rotary)

    def _heads(self, x_TE: Array, weight: Array) -> tuple[Array, Array]:
        """Return the heads that columns of `weight` give, [T, heads, D], and what normalises each, [T, heads, 1]."""
        heads = product(rms_norm(x_TE, self.gain), weight).reshape(len(x_TE), -1, len(self.key_gain))
        return heads, _inverse_rms(heads)

    def _queries(self, heads: Array, scale: Array, rotary: ArrayRotary) -> tuple[Array, Array]:
        own = self.num_heads
        return _turned(heads[:, :own] * scale[:, :own] * self.query_gain, rotary), heads[:, own:]

    def _rows(self, heads: Array, scale: Array, rotary: ArrayRotary) -> Array:
        own = self.num_kv_heads
        heads[:, :own] = _turned(heads[:, :own] * scale[:, :own] * self.key_gain, rotary)
        return heads.reshape(len(heads), 2, own, -1)


class ArrayBlock(NamedTuple):
    """`Block`: both projections, the output projection and the feed-forward."""

    event: ArrayProjection
    summary: ArrayProjection | None
    output: Array
    gain: Array
    up: Array
    down: Array

    @classmethod
    def of(cls, block: Block) -> Self:
        """Return the block as NumPy sees it."""
        summary = None if block.summary is None else ArrayProjection.of(block.summary)
        shared = map(array_of, (block.output, block.gain, block.up, block.down))
        return cls(ArrayProjection.of(block.event), summary, *shared)

    def finish(self, x_TE: Array, attended_THD: Array, gate_THD: Array) -> Array:
        """Add the gated attention output and the feed-forward to the residual stream. [T, E] -> [T, E]."""
        x_TE = x_TE + product((attended_THD * _sigmoid(gate_THD)).reshape(len(x_TE), -1), self.output)
        inner = product(rms_norm(x_TE, self.gain), self.up)
        half = inner.shape[1] // 2
        gate, up = inner[:, :half], inner[:, half:]
        return x_TE + product(gate * _sigmoid(gate) * up, self.down)


class ArrayNetwork(NamedTuple):
    """The parameters of a network that states are computed with.

    tables: of each feature of an event, [rows, E].
    summary_input: [m, E].
    request: of the bucketed gap to the request time, [rows, E]; None without.
    """

    tables: Mapping[str, Array]
    blocks: Sequence[ArrayBlock]
    summary_input: Array
    request: Array | None

    def embed(self, ids: Mapping[str, NDArray[np.int64]]) -> Array:
        """Return event inputs [T, E] from each feature's rows, int64 [T] (`EventEmbedding.ids`)."""
        total, *others = [self.tables[name][rows] for name, rows in ids.items()]
        for found in others:
            total += found
        return total * math.sqrt(total.shape[1])


def attend(query: Array, rows: Array) -> Array:
    """Return what one query [H, D] gathers from the rows it sees, [L, 2, J, D]."""
    num_kv_heads, head_dim = rows.shape[2:]
    by_key_head = query.reshape(num_kv_heads, -1, head_dim)
    keys, values = rows[:, 0].transpose(1, 0, 2), rows[:, 1].transpose(1, 0, 2)
    if by_key_head[0].size * len(rows) > LARGE:
        q, k, v = (torch.from_numpy(each)[None] for each in (by_key_head, keys, values))
        return F.scaled_dot_product_attention(q, k, v).numpy().reshape(query.shape)
    weights = (by_key_head * head_dim**-0.5) @ keys.transpose(0, 2, 1)
    weights -= np.maximum.reduce(weights, axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    gathered = weights @ values
    gathered /= np.add.reduce(weights, axis=-1, keepdims=True)
    return gathered.reshape(query.shape)


def product(x: Array, weight: Array) -> Array:
    """Return x @ weight, [T, in] by [in, out]."""
    if len(x) * weight.size <= LARGE:
        return x @ weight
    return torch.mm(torch.from_numpy(x), torch.from_numpy(weight)).numpy()


def rms_norm(x: Array, gain: Array) -> Array:
    """Return x / sqrt(mean(x ** 2) + eps) * gain, the mean over the last dimension."""
    return x * _inverse_rms(x) * gain


def rotary_of(position: Sequence[int] | NDArray[np.int64], head_dim: int, dtype: np.dtype) -> ArrayRotary:
    """Return each position's angles, as `rotary_table` does."""
    angle = np.array(position, dtype=np.float64).reshape(-1, 1, 1, 1) * _frequency(head_dim)
    return np.cos(angle).astype(dtype), (np.sin(angle) * _SIGN).astype(dtype)


def array_of(parameter: Tensor) -> Array:
    """Return a parameter as an array: the same memory."""
    return parameter.detach().numpy()


_SIGN = np.array([[-1.0], [1.0]])
"""Of a half's sine."""


@cache
def _frequency(head_dim: int) -> Array:
    return BASE ** (np.arange(0, head_dim, 2) / -head_dim)


def _inverse_rms(x: Array) -> Array:
    return 1 / np.sqrt(np.vecdot(x, x)[..., None] / x.shape[-1] + EPS)


def _turned(heads: Array, rotary: ArrayRotary) -> Array:
    """Return heads [T, H, D] turned by their token's angles: halves a, b to a cos - b sin, b cos + a sin."""
    cos, sin = rotary
    halves = heads.reshape(*heads.shape[:-1], 2, -1)
    return (halves * cos + halves[:, :, ::-1] * sin).reshape(heads.shape)


def _sigmoid(x: Array) -> Array:
    return 0.5 * np.tanh(0.5 * x) + 0.5  # 1 / (1 + exp(-x)) would overflow
