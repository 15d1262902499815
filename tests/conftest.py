"""Fixtures shared by all rooms' tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of open, real data beside the repository; tests that use it carry the marker `real`."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the real data (../shared) is not beside this checkout")
    return folder
