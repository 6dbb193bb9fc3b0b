"""Exact search over item vectors."""
