"""Settings of all tests, and which of them see a GPU: those of tests/gpu alone."""

import atexit
import gc
import os
import signal
from pathlib import Path

import pytest

from grpo_launcher.launch.hardware import find_gpus

# All are read once, at the first import of Hugging Face's libraries and of torch.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # without a network the client retries for minutes
os.environ["OMP_NUM_THREADS"] = "1"  # two workers of pytest share two cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, as would its children
gc.disable()  # as in slow_imports.py, until all test modules are imported


GPU_TESTS = Path(__file__).parent / "gpu"
VISIBLE_DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")
HAS_GPU = bool(find_gpus())


def _wants_gpu(item: pytest.Item) -> bool:
    return GPU_TESTS in item.path.parents


def pytest_collection_finish():
    """Collect garbage again, but not what was imported."""
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.enable()


def pytest_collection_modifyitems(items):
    """Skip tests/gpu where no GPU is visible."""
    for item in items:
        if _wants_gpu(item) and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU is visible"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Show GPUs to tests/gpu and hide them from all others, before a fixture starts anything."""
    if not _wants_gpu(item):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif VISIBLE_DEVICES is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE_DEVICES
