"""What a rank need not load is not loaded, and is there for who needs it later."""

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
