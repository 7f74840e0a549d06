"""Fixtures shared by all tests."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("phasewise", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("phasewise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party measurements and traces beside the checkout; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the folder of public measurements is absent: {folder}")
    return folder
