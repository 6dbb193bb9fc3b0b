"""Fixtures shared by all tests: fresh random inputs each run, the seed printed so that a failure replays."""

import os
import sys
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


@pytest.fixture(autouse=True)
def _torch_draws_by_the_seed(seed: int) -> None:
    """Draws of torch's own generator are fresh and replay, too; torch is not imported for this."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of a synthetic log: event types, side features, sessions, repeats."""
    from recsys_ksa.testing import item_table, lifelong_log, prepared_dataset

    log = lifelong_log(11, users=60, items=150, median_length=50)
    return prepared_dataset(tmp_path_factory.mktemp("data"), log, items=item_table(150)).path


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained for a few steps on `tiny_data`; tests must not write into it."""
    from recsys_ksa.testing import trained_run

    return trained_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_data, steps=4)
