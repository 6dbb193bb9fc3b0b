"""Fixtures shared by all tests: fresh random inputs each run, the seed printed so that a failure replays."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("nightly", parent=settings.get_profile("default"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed, or KSA_TEST_SEED; shown with a failure."""
    value = int(os.environ.get("KSA_TEST_SEED", np.random.SeedSequence().generate_state(1)[0]))
    request.node.add_report_section("setup", "seed", f"KSA_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real data sets: KSA_REALDATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("KSA_REALDATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set KSA_REALDATA")
    return folder
