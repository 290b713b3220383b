"""Colocate, server, overlap and `trl grpo` on your GPUs: `python benchmarks/gpu.py [--shapes "0.5 B" "1.5 B"]`.

Random weights in the shapes of Qwen2.5, so nothing is downloaded, and every completion has its full length. Each way
trains a few steps with the same rows, batch and reward. One GPU: colocate, and a server on the same GPU that gets the
weights as files. Two and more: colocate, server, server with overlap. Beside them `trl grpo`, as it is (transformers
generates) and with vLLM inside. Without a GPU server, overlap and `trl grpo` run on the CPU, to see that they work:
`--shapes "1 M"`.
"""

import contextlib
import os
import subprocess
import tempfile
import threading
from pathlib import Path

from common import OWN_STEP, SHAPES, STOCK_STEP, TRL, parser, show, vllm_server, watch, write_recipe
from helpers import ROOT

from grpo_launcher.launch.hardware import find_gpus

TOKENS, BATCH = 256, 32  # of a completion; completions of a step of one GPU
FIELDS = {"per_device_train_batch_size": BATCH, "max_completion_length": TOKENS, "learning_rate": 1e-6}
PROMPTS = [f"What of the cat number {number}? " + "It waits. " * 30 for number in range(256)]  # some 200 tokens
STOCK_VLLM = "trl grpo, vLLM"
SHARED = ["--gpu-memory-utilization", "0.35", "--dtype", "bfloat16", "--max-model-len", "1024"]


@contextlib.contextmanager
def gpu_memory():
    """Yield a list to which the most memory that any GPU held, in GiB, is added at the end."""
    found, peak, done = [], [0.0], threading.Event()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]

    def look():
        while find_gpus() and not done.wait(0.5):
            used = subprocess.run(query, capture_output=True, text=True).stdout.split()
            peak.append(max(map(float, used)) / 1024)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(max(peak))


def measure(way: str, recipe: Path) -> dict:
    """Run one way and return its figures."""
    folder = recipe.parent / way.replace(" ", "-")
    own = ["bash", str(ROOT / "launch_train.sh"), str(recipe), "--no-install", "--sample_every", "0"]
    own += ["--output_dir", str(folder)]
    flags = {"colocate": ["--colocate"], "server": [], "overlap": ["--overlap", "true"]}
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(gpu_memory())
        if way.startswith("trl grpo"):
            command = [TRL, "grpo", "--config", str(recipe), "--output_dir", str(folder)]
            command += ["--use_vllm", "true", "--vllm_mode", "colocate"] if way == STOCK_VLLM else []
            pattern = STOCK_STEP
        elif way == "server beside":
            url = stack.enter_context(vllm_server(str(recipe.parent / "model"), SHARED, os.environ.copy()))
            command, pattern = [*own, "--vllm_server_base_url", url, "--sync", "disk"], OWN_STEP
        else:
            command, pattern = [*own, *flags[way]], OWN_STEP
        found = watch(command, pattern, cwd=ROOT)
    ranks = len(find_gpus()) or 2
    if find_gpus():
        ranks -= way in ("server", "overlap")
    elif way == "trl grpo":
        ranks = 1
    return {
        "completions a step": BATCH * ranks,
        "first step, s": found["first"],
        "a step, s": found["step"],
        "completions/s": BATCH * ranks / found["step"],
        "tokens/s": BATCH * ranks * TOKENS / found["step"],
        "GiB of a GPU": memory[0],
    }


def main() -> None:
    """Print the table."""
    gpus = len(find_gpus())
    ways = ["colocate", "server", "overlap"] if gpus > 1 else ["colocate", "server beside"]
    ways = [*ways, "trl grpo", STOCK_VLLM] if gpus else ["server", "overlap", "trl grpo"]
    command = parser(__doc__)
    command.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5 B", "1.5 B"], help="models")
    command.add_argument("--ways", nargs="+", choices=ways, default=ways, help="default: all that fit the machine")
    command.add_argument("--steps", type=int, default=6, help="default: 6")
    args = command.parse_args()
    rows = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as name:
            here = {} if gpus else {"use_cpu": True, "bf16": False}
            recipe = write_recipe(Path(name), shape, PROMPTS, **FIELDS, **here, max_steps=args.steps)
            for way in args.ways:
                rows.append({"model": shape, "way": way} | measure(way, recipe))
                print(rows[-1], flush=True)
    show(rows, args.output)


if __name__ == "__main__":
    main()
