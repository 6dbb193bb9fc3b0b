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
from recsys_ksa.features.questions import QuestionFeatures, WeightedRows
from recsys_ksa.features.users import Told, UserColumns, UserFeature, told_users

__all__ = [
    "NO_GAP",
    "NUM_GAP_BUCKETS",
    "EventFeatures",
    "QuestionFeatures",
    "Told",
    "UserColumns",
    "UserFeature",
    "WeightedRows",
    "gap_bucket",
    "gap_buckets",
    "history_gap_buckets",
    "request_bucket",
    "told_users",
]
