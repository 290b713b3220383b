"""What a rank need not load is not loaded, and is there for who needs it later."""

import pytest
from helpers import ROOT, run_python

RANK = """
import sys
from grpo_launcher.slow_imports import quick_imports, skip_vllm

with quick_imports():
    skip_vllm()
    from grpo_launcher.trainer import Trainer
print([name for name in ("bitsandbytes", "vllm", "scipy.stats") if name in sys.modules])
from transformers.utils import is_bitsandbytes_available
from trl.import_utils import is_vllm_available
print(is_bitsandbytes_available(), is_vllm_available())
"""


def test_a_rank_beside_a_server_loads_neither_vllm_nor_bitsandbytes():
    """An 8-bit optimizer still finds bitsandbytes."""
    done = run_python("-c", RANK, cwd=ROOT, DS_ACCELERATOR="cpu")
    assert done.stdout.splitlines()[-2:] == ["[]", "True True"]


@pytest.mark.parametrize("mode, is_loaded", [("colocate", True), ("server", False)])
def test_a_rank_with_vllm_inside_has_bitsandbytes(mode, is_loaded):
    """TRL asks whether it is installed, and uses it by the name that its own import gave it."""
    values = {"load_in_4bit": False, "load_in_8bit": False, "use_vllm": True, "vllm_mode": mode}
    code = f"from grpo_launcher.slow_imports import quick_imports\nwith quick_imports({values}):\n    import sys\n"
    code += "    import transformers, trl.generation.vllm_generation as module\nprint(hasattr(module, 'bnb'))"
    done = run_python("-c", code, cwd=ROOT, DS_ACCELERATOR="cpu")
    assert done.stdout.splitlines()[-1] == str(is_loaded)
    assert "leaked" not in done.stderr, "what is kept out of collections is given back before the end"
