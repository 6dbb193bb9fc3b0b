"""Offline evaluation: protocols, baselines, metrics, reports."""
