"""How many threads a pass is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FEW_TOKENS = 16
"""New tokens up to which a pass is computed by one thread."""


@contextmanager
def fitting_threads(num_tokens: int) -> Iterator[None]:
    """Compute a pass over few tokens with one thread: waking another takes longer than its share of the work.

    torch keeps the number a thread, so others in flight keep theirs; one whose first torch operator falls into this
    pass starts, and stays, with one.
    """
    before = torch.get_num_threads()
    if before == 1 or num_tokens > FEW_TOKENS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
