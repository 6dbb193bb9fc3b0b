"""The promise of `--memory`: how much is held at a time, and what is refused because it would not fit."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys_ksa.errors import DataError, UsageError

BASE = 400 << 20
"""Bytes the process takes before it reads anything (libraries, thread stacks, allocator)."""
BYTES_PER_ROW = 1_000
"""Bytes a spilled row takes at the peak of the first pass, with ids of ordinary length."""
BYTES_PER_EVENT = 500
"""Bytes an event of a bucket takes at the peak of the second and third pass, with ids of ordinary length."""
TOGETHER = 1 << 17
"""Events of small buckets that are worked on together, at most; more of them are not worth the memory."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Memory:
    """Bytes that all processes together may take."""

    num_bytes: int = 4 << 30

    @classmethod
    def parse(cls, text: str) -> "Memory":
        """Return the memory that `4GiB`, `512MiB` or `4G` names; units are powers of 1,024.

        Raises:
            UsageError: it is no size, or smaller than the libraries need.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
        if found is None:
            raise UsageError(f"--memory: expected a size such as 4GiB, got {text!r}.")
        memory = cls(int(float(found[1]) * _UNITS[found[2].upper()]))
        if memory.num_bytes < 2 * BASE:
            raise UsageError(f"--memory: expected at least {2 * BASE >> 20} MiB, got {text!r}.")
        return memory

    def chunk_rows(self, workers: int) -> int:
        """Return how many rows of a log each of some workers may read at a time."""
        return int(np.clip((self.num_bytes - BASE) // (2 * workers * BYTES_PER_ROW), 1 << 14, 1 << 19))

    def bucket_events(self, workers: int) -> int:
        """Return how many events of small buckets each of some workers may hold together."""
        return int(np.clip((self.num_bytes - BASE) // (workers * BYTES_PER_EVENT), 1, TOGETHER))

    def refuse_large_buckets(self, rows: NDArray[np.int64], workers: int, processes: int, log: str) -> None:
        """Refuse a log whose largest buckets do not fit, one a worker.

        Args:
            rows: rows of each bucket, int64 [num_buckets].
            workers: buckets held at a time.
            processes: that hold them.
            log: what the user called it.

        Raises:
            DataError: it says how many buckets or how much memory would do.
        """
        held, largest = np.sort(rows)[-workers:], int(rows.argmax())
        need = processes * BASE + int(held.sum()) * BYTES_PER_EVENT
        if need > self.num_bytes:
            buckets = len(rows) * 2 ** int(np.ceil(np.log2(need / self.num_bytes)) + 1)
            raise DataError(
                f"{log}: expected buckets that fit {self.num_bytes / 2**30:.1f} GiB, bucket {largest} has "
                f"{int(rows.max()):,} rows and needs about {need / 2**30:.1f} GiB. Say --num-buckets {buckets} "
                f"(a new data set), or --memory {need / 2**30 + 0.1:.1f}GiB."
            )
