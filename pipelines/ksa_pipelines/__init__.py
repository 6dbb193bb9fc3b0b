"""Polars pipelines: logs of user behaviour in, prepared data sets out. Imports without torch."""
