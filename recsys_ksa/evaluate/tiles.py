"""The best items of each user over catalogues of any size, in bounded memory: users times items is never held.

Shapes: Q users, I items, E width of vectors, R rows and C columns of a tile.
"""

import torch
from torch import Tensor

BLOCK = 256
"""Columns of which only the maximum is looked at first."""
MAX_SCORES = 1 << 24
"""Scores of a tile (64 MiB)."""
TILE_ITEMS = 1 << 14
"""Columns of a tile: enough that reading a tile's items is nothing beside multiplying them."""


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best scores of each row, best first, and their columns. [R, C] -> [R, k], int64 [R, k].

    As torch.topk; on a CPU it finds the k blocks of columns with the largest maxima first, and looks into those only:
    the best k scores lie in them. Which of equal scores is taken is not defined.

    Args:
        scores: of any float type, without NaN.
        k: at most C.
    """
    rows, columns = scores.shape
    whole = columns // BLOCK
    if scores.is_cuda or whole <= 2 * k:
        return scores.topk(k, dim=1)
    blocks = scores[:, : whole * BLOCK].unflatten(1, (whole, BLOCK))
    chosen = blocks.amax(dim=2).topk(k, dim=1).indices
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    place = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    rest = torch.arange(whole * BLOCK, columns).expand(rows, -1)
    found = torch.cat((inside, scores[:, whole * BLOCK :]), dim=1).topk(k, dim=1)
    return found.values, torch.cat((place, rest), dim=1).gather(1, found.indices)


def stream_top_k(
    users: Tensor, items: Tensor, k: int, *, max_scores: int = MAX_SCORES, tile_items: int = TILE_ITEMS
) -> tuple[Tensor, Tensor]:
    """Return each user's k best products with all items, tile by tile. [Q, E], [I, E] -> [Q, k], int64 [Q, k].

    Memory beside the answer: one tile of `max_scores` scores and its best. Equal to the top k of users @ items.T up to
    the rounding of a product of another shape.

    Args:
        users, items: float, on one device; scores are of their type.
        k: at most I.
        max_scores: of a tile.
        tile_items: columns of a tile.
    """
    columns = min(tile_items, len(items))
    rows = max(1, max_scores // columns)
    values = users.new_empty(len(users), k)
    indices = torch.empty(len(users), k, dtype=torch.int64, device=users.device)
    for first in range(0, len(users), rows):
        part = slice(first, min(first + rows, len(users)))
        values[part], indices[part] = _best_of_rows(users[part], items, k, columns)
    return values, indices


def _best_of_rows(users: Tensor, items: Tensor, k: int, columns: int) -> tuple[Tensor, Tensor]:
    best = users.new_full((len(users), k), -torch.inf)
    index = torch.zeros(len(users), k, dtype=torch.int64, device=users.device)
    for start in range(0, len(items), columns):
        tile = users @ items[start : start + columns].T
        value, place = top_k(tile, min(k, tile.shape[1]))
        found = torch.cat((best, value), dim=1).topk(k, dim=1)
        index = torch.cat((index, place + start), dim=1).gather(1, found.indices)
        best = found.values
    return best, index
