"""Data from outside the repository that some tests need."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data")).resolve()


def outside_data(relative: str) -> Path:
    """Return a file or folder of it, or skip the test where it is not there."""
    path = FOLDER / relative
    if not path.exists():
        pytest.skip(f"{path} is not there (TEST_DATA names the folder)")
    return path
