"""Fixtures of the tests with real servers and real ranks on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, Launch, run_here


def pytest_collection_modifyitems(items):
    """Mark every test of this folder slow, and let them come first: the short ones fill the end evenly."""
    slow = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in slow:
        item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item not in slow)


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
def quickstart_data(tmp_path_factory) -> Path:
    """A folder with the quickstart's base model and posts, as `python -m grpo_launcher.quickstart` makes them."""
    folder = tmp_path_factory.mktemp("quickstart")
    run_here("grpo_launcher.quickstart", "--output", folder, cwd=folder)
    return folder


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


@pytest.fixture(scope="session")
def server_url(quickstart_data, launch, tmp_path_factory) -> Iterator[str]:
    """The URL of one server with the quickstart's model, for all runs that need none of their own.

    It is started by the command that --dry-run prints. Every run pushes its weights before it generates.
    """
    folder = tmp_path_factory.mktemp("server")
    (folder / "data").symlink_to(quickstart_data)
    flags = [str(ROOT / "configs/quickstart.yaml"), "--vllm_max_model_length", "1024", "--dry-run"]
    text = launch(folder, *flags).finish().text()
    environment, command = text.partition("vLLM server:\n")[2].splitlines()[:2]
    server = launch(folder, command=["bash", "-c", f"{environment} exec {command}"])
    yield f"http://127.0.0.1:{command.split('--port ')[1].split()[0]}"
    server.end()
