"""Fixtures of the tests with real servers and real ranks on the CPU."""

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import Launch, run_python


def pytest_collection_modifyitems(items):
    """Mark every test of this folder slow."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def launch():
    """Return the class Launch as a function that keeps its runs. What is left of them is killed at the end."""
    started = []

    def begin(*args, **kwargs) -> Launch:
        started.append(Launch(*args, **kwargs))
        return started[-1]

    yield begin
    for run in started:
        if run.process.poll() is None:
            run.process.terminate()
        run.end()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Return a function that gives the folder `name`, filled by make(folder) once for all workers of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make) -> Path:
        folder = root / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                draft = folder.with_name(f"{name}-draft")
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                make(draft)
                draft.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def quickstart_data(made_once):
    """A folder with the quickstart's base model and posts, as `python -m grpo_launcher.quickstart` makes them."""
    return made_once(
        "quickstart", lambda folder: run_python("-m", "grpo_launcher.quickstart", "--output", folder, cwd=folder)
    )


@pytest.fixture
def workplace(quickstart_data, tmp_path) -> Path:
    """A new folder in which the quickstart's model and posts are at hand."""
    (tmp_path / "data").symlink_to(quickstart_data)
    return tmp_path


@pytest.fixture(scope="module")
def module_workplace(quickstart_data, tmp_path_factory) -> Path:
    """The same for the tests of a module that share a run."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").symlink_to(quickstart_data)
    return folder
