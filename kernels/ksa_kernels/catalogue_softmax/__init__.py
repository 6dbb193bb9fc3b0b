"""The normaliser of a softmax over a whole catalogue of items, without the table of scores."""

from ksa_kernels.catalogue_softmax.api import catalogue_log_z

__all__ = ["catalogue_log_z"]
