"""Fixtures of the quick tests."""

import pytest
from chat_models import checkpoints, place  # noqa: F401
from tiny_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small model."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, seed=0)
    return folder
