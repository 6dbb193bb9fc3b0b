"""Progress bars for commands. Library code never prints."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yield `items` under a bar on standard error; silent where that is no terminal."""
    return iter(tqdm(items, desc=description, total=total, unit=unit, disable=None, leave=False))
