"""The own-item bias as an answer computes it equals the one that is trained."""

import numpy as np
import pytest
import torch

from recsys_ksa.model.own_items import ITEMS_AT_ONCE, ArrayOwnItemBias, OwnItemBias
from recsys_ksa.model.seen import SeenItems
from recsys_ksa.retrieval.index import ROWS_AT_ONCE, row_products


def drawn_bias(rng: np.random.Generator, unit: float, dtype: torch.dtype) -> OwnItemBias:
    bias = OwnItemBias(unit).to(dtype)
    for value in bias.parameters():
        value.data.copy_(torch.from_numpy(rng.normal(size=tuple(value.shape))))
    return bias


@pytest.mark.parametrize("num_events", [0, 1, 50, 3 * ITEMS_AT_ONCE])
@pytest.mark.parametrize("unit", [86_400.0, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_arrays_equal_the_network(
    rng: np.random.Generator, num_events: int, unit: float, dtype: torch.dtype, tolerance: float
) -> None:
    bias = drawn_bias(rng, unit, dtype)
    times = np.sort(rng.integers(0, int(400 * unit), num_events))
    seen = SeenItems.from_events(rng.integers(1, max(2, num_events // 2), num_events), times)
    now = int(times[-1] if num_events else 0) + int(rng.integers(-5, 5)) * int(unit)  # also a question of the past
    with torch.no_grad():
        columns = (torch.from_numpy(column) for column in (seen.count, seen.first, seen.last))
        expected = bias(*columns, torch.tensor(now))
    found = ArrayOwnItemBias.of(bias)(seen, now)
    assert found.dtype == expected.numpy().dtype
    np.testing.assert_allclose(found, expected.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_rows", [0, 1, 2 * ROWS_AT_ONCE + 7])
def test_products_of_gathered_rows_are_those_of_the_whole(rng: np.random.Generator, num_rows: int) -> None:
    vectors, vector = rng.normal(size=(100, 9)).astype(np.float32), rng.normal(size=9).astype(np.float32)
    rows = rng.integers(0, 100, num_rows).astype(np.int32)
    np.testing.assert_allclose(row_products(vectors, rows, vector), vectors[rows] @ vector, rtol=1e-5, atol=1e-5)
