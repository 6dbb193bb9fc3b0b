"""Prepared histories, from disk to jagged batches."""
