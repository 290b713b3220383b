"""Fixtures of the quick tests."""

from chat_models import checkpoints, place  # noqa: F401
