from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys_ksa.data.dataset import Dataset, Histories, Items
from recsys_ksa.data.manifest import Counts, Manifest, TieAudit

DAY = 86_400


@pytest.fixture
def make_histories() -> Callable[..., Histories]:
    return _histories


@pytest.fixture
def random_histories() -> Callable[..., Histories]:
    def draw(rng: np.random.Generator, users: int = 20, items: int = 12, days: int = 80) -> Histories:
        """Return short and long histories with many ties and repeats; some users have one event or one timestamp."""
        lengths = rng.integers(1, 40, users)
        lengths[:3] = (1, 2, 3)
        users_events = []
        for length in lengths:
            times = np.sort(rng.integers(0, days, length)) * DAY // int(rng.integers(1, 3))
            users_events.append([(int(rng.integers(1, items + 1)), int(time)) for time in times])
        users_events.append([(1, 5 * DAY)] * 4)
        return _histories(users_events)

    return draw


@pytest.fixture
def make_dataset() -> Callable[..., Dataset]:
    def build(histories: Histories, items: int = 12, *, clock="unix", tie="arrival", is_artefact=False) -> Dataset:
        audit = TieAudit(
            order="arrival",
            gap_0_share=0.5,
            tied_target_share=0.5,
            num_tied_pairs=5000,
            next_id_greater=1.0 if is_artefact else 0.5,
            is_artefact=is_artefact,
        )
        counts = Counts(
            users=histories.num_users,
            items=items,
            events=histories.num_events,
            shortest_history=0,
            median_history=1.0,
            longest_history=1,
        )
        manifest = Manifest.model_construct(
            clock=clock,
            tie=tie,
            tie_audit=audit,
            counts=counts,
            content_hash="c" * 64,
            split_hash="s" * 64,
            split={} if clock == "ordinal" else {"global": {}},
        )
        names = [None, *(f"i{number}" for number in range(1, items + 1))]
        zeros = np.zeros(items + 1, np.int64)
        return Dataset(Path("nowhere"), manifest, Items(names, zeros, zeros, {}, None), {}, histories)

    return build


def _histories(users: list[list[tuple[int, int]]], test_days: int = 20, valid_days: int = 10) -> Histories:
    """Return histories of (item, time) events; splits by the plainest loop there is."""
    end = max(time for events in users for _, time in events)
    test_start = end - test_days * DAY + 1
    valid_start = test_start - valid_days * DAY
    split: dict[str, list[int]] = {name: [] for name in ("loo_valid", "loo_test", "global_valid", "global_test")}
    for events in users:
        times = [time for _, time in events]
        distinct = sorted(set(times))
        cuts = (distinct[-2], distinct[-1]) if len(distinct) >= 3 else (end + 1, end + 1)
        split["loo_valid"].append(sum(time < cuts[0] for time in times))
        split["loo_test"].append(sum(time < cuts[1] for time in times))
        split["global_valid"].append(sum(time < valid_start for time in times))
        split["global_test"].append(sum(time < test_start for time in times))
    flat = [event for events in users for event in events]
    return Histories(
        user_id=pa.array([f"u{row}" for row in range(len(users))]),
        user_index=np.arange(len(users)),
        offsets=np.cumsum([0, *(len(events) for events in users)]),
        item_index=np.array([item for item, _ in flat], dtype=np.int32),
        timestamp=np.array([time for _, time in flat], dtype=np.int64),
        event_type=None,
        split={name: np.array(values, dtype=np.int32) for name, values in split.items()},
    )
