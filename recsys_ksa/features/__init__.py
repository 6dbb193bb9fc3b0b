"""Event features, defined once for training, pipeline and service. Torch-free: arrays in, integers out."""

from recsys_ksa.features.event_features import EventFeatures
from recsys_ksa.features.gaps import (
    NO_GAP,
    NUM_GAP_BUCKETS,
    gap_bucket,
    gap_buckets,
    history_gap_buckets,
    request_bucket,
)

__all__ = [
    "NO_GAP",
    "NUM_GAP_BUCKETS",
    "EventFeatures",
    "gap_bucket",
    "gap_buckets",
    "history_gap_buckets",
    "request_bucket",
]
