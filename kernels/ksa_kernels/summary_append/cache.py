"""PagedCache: keys and values of many users in pages of one pool, read in place.

Events live in a ring of pages a user (what leaves the window is overwritten), summaries likewise; a ring as long as the
history, or as the visible part of it, never wraps onto what is still seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ksa_kernels.errors import ShapeError
from ksa_kernels.layout import ChunkLayout


@dataclass(frozen=True)
class Pages:
    """One kind of token's pages."""

    key: Tensor
    """[pages, page_size, J, D]"""
    value: Tensor
    """[pages, page_size, J, D]"""
    table: Tensor
    """int32 [U, ring]: user u's token t is in page table[u, (t // page_size) % ring], at t % page_size."""

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.key.shape[1]

    def rows(self, user: Tensor, token: Tensor) -> Tensor:
        """Return where tokens are in the pool, as rows of key.flatten(0, 1)."""
        page = self.table[user, (token // self.page_size) % self.table.shape[1]].long()
        return page * self.page_size + token % self.page_size

    @staticmethod
    def allocate(num_users: int, ring: int, page_size: int, num_heads: int, head_dim: int, like: Tensor) -> Pages:
        """Return a pool in which each user has `ring` pages, dealt out in order; `like` gives dtype and device."""
        key, value = (like.new_zeros(num_users * ring, page_size, num_heads, head_dim) for _ in range(2))
        table = torch.arange(num_users * ring, dtype=torch.int32, device=like.device).view(num_users, ring)
        return Pages(key, value, table)


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer for the users of a layout, in the layout's order of users."""

    events: Pages
    summaries: Pages

    def check(self, layout: ChunkLayout) -> None:
        """Raise ShapeError if a user's visible tokens do not fit into the rings."""
        m = layout.summaries_per_chunk
        for name, pages, counts in (
            ("events", self.events, [span.num_key_events for span in layout.spans]),
            ("summaries", self.summaries, [span.num_key_chunks * m for span in layout.spans]),
        ):
            if pages.table.shape[0] != layout.num_users:
                raise ShapeError(
                    f"cache.{name}.table must have one row a user: expected {layout.num_users}, "
                    f"got {pages.table.shape[0]}."
                )
            # a range of n tokens that starts inside a page touches one page more
            needed = max((-(-count // pages.page_size) + 1 for count in counts if count), default=0)
            longest = max((span.num_events for span in layout.spans), default=0)
            if needed > pages.table.shape[1] and -(-longest // pages.page_size) > pages.table.shape[1]:
                raise ShapeError(
                    f"cache.{name}.table must have {needed} pages a user for what the layout sees: "
                    f"got {pages.table.shape[1]} pages of {pages.page_size}."
                )

    def write(self, layout: ChunkLayout, events: tuple[Tensor, Tensor], summaries: tuple[Tensor, Tensor]) -> None:
        """Write keys and values of the layout's queried events and of the summaries that they closed, in place."""
        self._put(self.events, layout.event_query_offsets, layout.event_query_index, events)
        slots = layout.summary_query_chunk * layout.summaries_per_chunk + layout.summary_query_slot
        self._put(self.summaries, layout.summary_query_offsets, slots, summaries)

    def write_all(self, layout: ChunkLayout, events: tuple[Tensor, Tensor], summaries: tuple[Tensor, Tensor]) -> None:
        """Write keys and values of all that the layout's queries see, in place."""
        self._put(self.events, layout.event_key_offsets, layout.event_key_index, events)
        slots = layout.summary_key_chunk * layout.summaries_per_chunk + layout.summary_key_slot
        self._put(self.summaries, layout.summary_key_offsets, slots, summaries)

    def gather(self, layout: ChunkLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return event keys, values, summary keys, values as `summary_attention` takes them: copies."""
        slots = layout.summary_key_chunk * layout.summaries_per_chunk + layout.summary_key_slot
        return (
            *self._get(self.events, layout.event_key_offsets, layout.event_key_index),
            *self._get(self.summaries, layout.summary_key_offsets, slots),
        )

    @staticmethod
    def _put(pages: Pages, offsets: Tensor, tokens: Tensor, rows: tuple[Tensor, Tensor]) -> None:
        where = pages.rows(_users(offsets), tokens)
        for pool, given in zip((pages.key, pages.value), rows, strict=True):
            pool.flatten(0, 1).index_copy_(0, where, given)

    @staticmethod
    def _get(pages: Pages, offsets: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        where = pages.rows(_users(offsets), tokens)
        return pages.key.flatten(0, 1)[where], pages.value.flatten(0, 1)[where]


def _users(offsets: Tensor) -> Tensor:
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
