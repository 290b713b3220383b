"""What a training rank and the preflight need not load."""

import atexit
import functools
import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def skip_deepspeed_ops() -> None:
    """Keep DeepSpeed on a CPU from compiling an operator: only inference uses it, it takes a minute and a compiler.

    Call it before the arguments are built: they start DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # looked up by this name at the first use, and kept


@contextmanager
def quick_imports(values: dict | None = None) -> Iterator[None]:
    """Import without collecting garbage, which takes a fifth of the time, and without bitsandbytes, which takes 2 s.

    Later collections leave out what was imported.

    The list of all installed packages, which transformers and TRL make by themselves in half a second, is made once.

    Args:
        values: those of a rank. One with quantised weights needs bitsandbytes, and so does one with vLLM inside:
            TRL looks there for quantised layers if the package is installed.
    """
    values = values or {}
    is_colocated = values.get("use_vllm") and values.get("vllm_mode") == "colocate"
    is_needed = values.get("load_in_4bit") or values.get("load_in_8bit") or is_colocated
    hides = not is_needed and "bitsandbytes" not in sys.modules
    if hides:
        sys.modules["bitsandbytes"] = None
    gc.disable()
    packages = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = functools.cache(packages)
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else libraries in C++ count what is left as leaks, and say so
        gc.enable()
        importlib.metadata.packages_distributions = packages
        if hides:
            from transformers.utils import is_bitsandbytes_available

            del sys.modules["bitsandbytes"]
            is_bitsandbytes_available.cache_clear()  # an 8-bit optimizer asks again


def skip_vllm() -> None:
    """Import TRL's trainer without vLLM, which takes 7 s and 0.15 GiB of every rank.

    TRL imports it for an engine inside the rank and for NCCL. A client that speaks HTTP alone needs none of it.
    """
    from trl import import_utils

    is_available, import_utils.is_vllm_available = import_utils.is_vllm_available, lambda min_version=None: False
    from trl.generation import vllm_client, vllm_generation

    for module in (import_utils, vllm_client, vllm_generation):
        module.is_vllm_available = is_available
