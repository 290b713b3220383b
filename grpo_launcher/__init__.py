"""GRPO from a reward idea to compared checkpoints: TRL's GRPOTrainer under ZeRO-3 beside a vLLM server."""

import logging

# At every import it tells that faster 4-bit kernels for the CPU are not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
