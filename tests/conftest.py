"""Fixtures shared by all tests."""

import json
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


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The config file of a model of two layers that calibrations of seconds measure."""
    from tests.calibrate.test_points import TINY

    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY))
    return path
