"""Summary attention of a few new events on states kept in pages: many users, each at an offset of its own."""

from ksa_kernels.summary_append.api import summary_append
from ksa_kernels.summary_append.cache import PagedCache, Pages

__all__ = ["PagedCache", "Pages", "summary_append"]
