"""Colocate, server, overlap and `trl grpo` on your GPUs: `python benchmarks/gpu.py [--shapes "0.5 B" "1.5 B"]`.

Random weights in the shapes of Qwen2.5, so nothing is downloaded, and every completion has its full length. Each way
trains a few steps with the same rows, batch and reward. One GPU: colocate, a server on the same GPU that gets the
weights as files, and `trl grpo`. Two and more: colocate, server, server with overlap, and `trl grpo`. Without a GPU
the last three run on the CPU, to see that they work: `--shapes "1 M"`.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import yaml
from common import ROOT, SHAPES, make_model, parser, show, watch

from grpo_launcher.launch.hardware import find_gpus, free_ports

TOKENS, BATCH = 256, 32  # of a completion; completions of a step of one GPU
RECIPE = {
    "reward_funcs": ["rewards.length.length_reward"],
    "per_device_train_batch_size": BATCH,
    "num_generations": 8,
    "max_completion_length": TOKENS,
    "learning_rate": 1e-6,
    "logging_steps": 1,
    "log_completions": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}
OWN_STEP, STOCK_STEP = r"^step +\d+/", r"'step_time'"
SHARED = 0.35  # of the GPU's memory, for a server beside the trainer


def prepare(folder: Path, shape: str, steps: int) -> Path:
    """Write model, rows of some 200 tokens, and the recipe."""
    from datasets import Dataset

    make_model(folder / "model", shape)
    rows = [
        {"prompt": [{"role": "user", "content": f"What of the cat number {n}? " + "It waits. " * 30}]}
        for n in range(256)
    ]
    (folder / "rows").mkdir()
    Dataset.from_list(rows).to_parquet(folder / "rows/train.parquet")
    recipe = RECIPE | {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "rows")}
    if not find_gpus():
        recipe |= {"use_cpu": True, "bf16": False}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"max_steps": steps}))
    return path


@contextlib.contextmanager
def server_beside(model: str):
    """Start a vLLM server on the trainer's GPU. Yields its address."""
    (port,) = free_ports(1)
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    serve += ["--dtype", "bfloat16", "--host", "127.0.0.1", "--max-model-len", "1024"]
    serve += ["--gpu-memory-utilization", str(SHARED), "--generation-config", "vllm"]
    serve += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    serve += ["--worker-extension-cls", "grpo_launcher.weight_sync_worker.DiskSyncWorker"]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with subprocess.Popen(serve, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


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
        if way == "trl grpo":
            command = [str(Path(sys.executable).with_name("trl")), "grpo", "--config", str(recipe)]
            command, pattern = [*command, "--output_dir", str(folder)], STOCK_STEP
        elif way == "server beside":
            url = stack.enter_context(server_beside(str(recipe.parent / "model")))
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
    ways = ["colocate", "server", "overlap", "trl grpo"] if gpus > 1 else ["colocate", "server beside", "trl grpo"]
    ways = ways if gpus else ["server", "overlap", "trl grpo"]
    command = parser(__doc__)
    command.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5 B", "1.5 B"], help="models")
    command.add_argument("--ways", nargs="+", choices=ways, default=ways, help="default: all that fit the machine")
    command.add_argument("--steps", type=int, default=6, help="default: 6")
    args = command.parse_args()
    rows = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as name:
            recipe = prepare(Path(name), shape, args.steps)
            for way in args.ways:
                rows.append({"model": shape, "way": way} | measure(way, recipe))
                print(rows[-1], flush=True)
    show(rows, args.output)


if __name__ == "__main__":
    main()
