"""What each feature of a run means, as a hash: of how it is computed, and of its vocabulary.

A row of a table means something only together with both. A run keeps the hashes it was trained with; whoever computes
another feature under the same name is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recsys_ksa.features.calendar import ROWS
from recsys_ksa.features.gaps import NO_GAP, NUM_GAP_BUCKETS
from recsys_ksa.features.sessions import LONGEST

if TYPE_CHECKING:
    from recsys_ksa.config import ModelConfig

Vocabulary = Sequence[str | None]
_CALENDAR = {"hour": "1 + timestamp // 3600 % 24", "weekday": "1 + (timestamp // 86400 + 3) % 7"}
assert set(_CALENDAR) == set(ROWS)


def feature_hashes(config: "ModelConfig", vocabularies: Mapping[str, Vocabulary]) -> dict[str, str]:
    """Return the SHA-256, as 64 hex digits, of each feature the config turns on, by name.

    Args:
        config: of the network.
        vocabularies: values by index, of `event_type`, the side features, and those of users as `user_<name>`; a side
            feature that has none is a vector, a user's a number.
    """
    told: dict[str, str] = {}
    if config.use_gap or config.use_request_time:
        told["gap"] = f"{NO_GAP} without one, else min(bit_length(max(gap, 0) + 1), {NUM_GAP_BUCKETS - 1})"
    told |= {name: _CALENDAR[name] for name in config.calendar}
    told |= {f"request_{name}": _CALENDAR[name] for name in config.request_calendar}
    if config.session_gap is not None:
        told["session"] = f"bit_length(min(place, {LONGEST})), a pause over {config.session_gap} s begins a session"
    if config.value_edges:
        told["value"] = f"0 without one, else 1 + edges at or below, of {[edge.hex() for edge in config.value_edges]}"
    if config.use_event_type and "event_type" in vocabularies:
        told["event_type"] = "vocabulary"
    told |= {name: "vocabulary" if name in vocabularies else "vector of length 1" for name in config.side_features}
    for name in config.user_features:
        edges = [edge.hex() for edge in config.user_edges.get(name, ())]
        told[f"user_{name}"] = f"0 without one, else 1 + edges at or below, of {edges}" if edges else "vocabulary"
    return {name: _hash(definition, vocabularies.get(name)) for name, definition in told.items()}


def _hash(definition: str, vocabulary: Vocabulary | None) -> str:
    values = None if vocabulary is None else list(vocabulary)
    return hashlib.sha256(json.dumps([definition, values]).encode()).hexdigest()
