"""The version of TRL that trainer.py was written for. Standard library only: it is checked before TRL is imported."""

import importlib.metadata

from grpo_launcher.errors import UserError

TRL_VERSION = "1.16.0"


def check_trl_version() -> None:
    """Raise UserError for any other TRL: the overrides of its methods hold for this version only."""
    try:
        installed = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        installed = "no trl"
    if installed != TRL_VERSION:
        problem = f"{installed} is installed, and this project overrides methods of trl {TRL_VERSION}"
        raise UserError("trl", problem, "pip install --no-deps --requirement requirements/cpu.lock, or gpu.lock")
