"""GRPO from a reward idea to compared checkpoints: TRL's GRPOTrainer under ZeRO-3 beside a vLLM server."""

import os
import sys

# Hugging Face's libraries and vLLM would tell their makers what is run.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# torch's threads would spin while they wait: beside a busy process a step would take 20 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# `python -m` looks in the working directory first, where a file queue.py would replace Python's.
is_started = sys.argv[:1] == ["-m"] and any(word.startswith("grpo_launcher.") for word in sys.orig_argv)
if is_started and not sys.flags.safe_path and not __file__.startswith(f"{sys.path[0]}/grpo_launcher/"):
    del sys.path[0]

import logging  # noqa: E402

from grpo_launcher.hub import bypass_proxies  # noqa: E402

bypass_proxies()
# At every import it tells that faster 4-bit kernels for the CPU are not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
