import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ksa_serving.int8_rows import pack_rows, row_bytes, unpack_rows


def drawn_rows(seed: int, count: int, heads: int, width: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    size = torch.exp(4 * torch.randn(count, 2, heads, 1, generator=draw))
    return size * torch.randn(count, 2, heads, width, generator=draw)


@given(seed=st.integers(0, 2**31), count=st.integers(0, 70), heads=st.integers(1, 3), width=st.sampled_from([1, 8, 32]))
def test_a_value_moves_by_half_a_step_of_its_rows_scale_at_most(seed: int, count: int, heads: int, width: int):
    rows = drawn_rows(seed, count, heads, width)
    packed = pack_rows(rows)
    assert len(packed) == count * row_bytes(heads, width)
    read = unpack_rows(packed, heads, width, torch.float64)
    step = rows.double().abs().amax(-1, keepdim=True) / 127 * 1.001 + 2**-24
    assert ((read - rows.double()).abs() <= 0.5 * step + 1e-12).all()


@given(seed=st.integers(0, 2**31), count=st.integers(1, 70))
def test_rounding_again_changes_almost_nothing(seed: int, count: int):
    once = unpack_rows(pack_rows(drawn_rows(seed, count, 2, 32)), 2, 32, torch.float32)
    again = unpack_rows(pack_rows(once), 2, 32, torch.float32)
    assert ((again - once).norm(dim=-1) <= 0.01 * once.norm(dim=-1) + 1e-6).all()


@pytest.mark.parametrize("value", [0.0, 1e-9, 60_000.0, 1e12])
def test_rows_of_one_value_keep_it(value: float):
    rows = torch.full((3, 2, 2, 32), value)
    read = unpack_rows(pack_rows(rows), 2, 32, torch.float32)
    torch.testing.assert_close(read, rows, rtol=1e-3, atol=2**-24)
