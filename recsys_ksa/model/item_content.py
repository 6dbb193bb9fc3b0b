"""What items' lists of categories and vectors add to the rows items are looked up by.

The categories of a list are looked up in one table and averaged; a vector, scaled to length 1, goes through a matrix.
An item without either gets zeros.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys_ksa.config import ModelConfig
from recsys_ksa.model.features import FeatureSchema

# Shapes: N items asked for, C categories of all of them, I items, D length of a vector, E model dim.


class ItemContent(nn.Module):
    """Lists of categories and vectors of the items, as buffers; the matrices of the vectors, as parameters."""

    def __init__(self, config: ModelConfig, features: FeatureSchema) -> None:
        super().__init__()
        self.multi = tuple(name for name in config.side_features if name in features.multi)
        self.vectors = tuple(name for name in config.side_features if name in features.vectors)
        self.num_rows = {table_name(name): features.multi[name].num_categories for name in self.multi}
        """Rows of each list's table, by the table's name."""
        for name in self.multi:
            lists = features.multi[name]
            self.register_buffer(f"offsets_{name}", torch.from_numpy(lists.offsets), persistent=False)
            self.register_buffer(f"index_{name}", torch.from_numpy(lists.index.astype("int64")), persistent=False)
        self.weight = nn.ParameterDict()
        for name in self.vectors:
            vectors = nn.functional.normalize(torch.from_numpy(features.vectors[name]), dim=-1)
            self.register_buffer(f"vectors_{name}", vectors, persistent=False)
            self.weight[name] = nn.Parameter(torch.randn(vectors.shape[1], config.dim) * config.dim**-0.5)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.multi or self.vectors)

    def ids(self, item_index: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the table rows of each list, int64 [C], and how many each item has, int64 [N]; by table."""
        ids: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for name in self.multi:
            offsets, index = self.get_buffer(f"offsets_{name}"), self.get_buffer(f"index_{name}")
            start, count = offsets[item_index], offsets[item_index + 1] - offsets[item_index]
            skipped = start - count.cumsum(0) + count
            place = torch.repeat_interleave(skipped, count)
            ids[table_name(name)] = index[place + torch.arange(len(place), device=place.device)]
            counts[table_name(name)] = count
        return ids, counts

    def forward(self, item_index: Tensor, found: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> Tensor:
        """Return what the items' content adds, [N, E].

        Args:
            item_index: int64 [N].
            found: the rows of `ids`, [C, E] by table.
            counts: of `ids`.
        """
        parts = [_mean(found[table_name(name)], counts[table_name(name)]) for name in self.multi]
        parts += [self.get_buffer(f"vectors_{name}")[item_index] @ self.weight[name] for name in self.vectors]
        total, *others = parts
        for part in others:
            total = total + part
        return total


def table_name(name: str) -> str:
    """Return the name of a list's table."""
    return f"multi_{name}"


def _mean(rows: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of each item's rows, [N, E]; zeros of none."""
    sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0, unsafe=True, initial=0.0)
    return sums / counts.clamp(min=1)[:, None]
