import random

import pytest
import torch


@pytest.fixture
def rng() -> random.Random:
    return random.Random(20_240_432)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on a busy machine: torch's threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
