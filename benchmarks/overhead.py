"""What this project costs beside TRL's own commands: `python benchmarks/overhead.py [--pairs N] [--server]`.

On the CPU. Without a server: train.py against `trl grpo`, one process each, with the same model, data, reward and
arguments.
With one (--server): launch_train.sh against `vllm serve` and `accelerate launch` with TRL's script, which gets our
sync by files, since NCCL needs GPUs. The two of a pair run one after the other, and pairs swap the order.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from common import (
    OWN_STEP,
    STOCK_STEP,
    TRL,
    cpu_environment,
    parser,
    ranks_command,
    show,
    vllm_server,
    watch,
    write_recipe,
)
from helpers import ROOT

FIELDS = {
    "max_steps": 16,
    "per_device_train_batch_size": 32,
    "max_completion_length": 64,
    "learning_rate": 1e-4,
    "beta": 0.04,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
}


def alone(folder: Path, number: int) -> dict[str, dict]:
    """Run both without a server."""
    config = ["--config", str(folder / "recipe.yaml"), "--output_dir"]
    own = [sys.executable, str(ROOT / "train.py"), *config, str(folder / f"own-{number}"), "--sample_every", "0"]
    stock = [TRL, "grpo", *config, str(folder / f"stock-{number}")]
    ways = {"own": (own, OWN_STEP), "stock": (stock, STOCK_STEP)}
    environment = cpu_environment() | {"OMP_NUM_THREADS": "2"}
    order = sorted(ways, reverse=bool(number % 2))
    return {way: watch(ways[way][0], ways[way][1], env=environment, cwd=ROOT) for way in order}


def beside_server(folder: Path, number: int) -> dict[str, dict]:
    """Run both with two ZeRO-3 ranks and a server."""
    config = [str(folder / "recipe.yaml"), "--output_dir"]
    own = ["bash", str(ROOT / "launch_train.sh"), *config, str(folder / f"own-{number}")]
    own += ["--no-install", "--sample_every", "0"]
    stock = [sys.executable, __file__, "--stock", *config, str(folder / f"stock-{number}"), "--use_vllm", "true"]
    stock += ["--vllm_mode", "server", "--vllm_server_timeout", "600"]
    ways = {"own": (own, OWN_STEP), "stock": (stock, STOCK_STEP)}
    return {way: watch(*ways[way], cwd=ROOT) for way in sorted(ways, reverse=bool(number % 2))}


def run_stock(recipe: str, *flags: str) -> None:
    """Start `vllm serve` and TRL's script under `accelerate launch` at once, as one would in two terminals."""
    model = yaml.safe_load(Path(recipe).read_text())["model_name_or_path"]
    served = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "TORCHDYNAMO_DISABLE": "1"}
    serve = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    train = ranks_command(__file__, Path(recipe).parent, "--config", recipe, *flags, "--vllm_server_base_url")
    with vllm_server(model, serve, cpu_environment() | served) as url:
        status = subprocess.run([*train, url], env=cpu_environment()).returncode
    sys.exit(status)


def rank(*arguments: str) -> None:
    """Run TRL's own script as a rank, with the sync by files in place of NCCL."""
    from trl.generation import vllm_generation
    from trl.scripts import grpo

    from grpo_launcher.weight_sync import DiskSyncClient

    vllm_generation.VLLMClient = DiskSyncClient
    os.chdir(ROOT)
    grpo.main(*grpo.make_parser().parse_args_and_config([*arguments]))


def main() -> None:
    """Print the table."""
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=5, help="default: 5")
    command.add_argument("--server", action="store_true", help="with a vLLM server and two ZeRO-3 ranks")
    args = command.parse_args()
    figures = {"own": [], "stock": []}
    with tempfile.TemporaryDirectory() as name:
        write_recipe(Path(name), "1 M", [f"Tell me about number {number}." for number in range(64)], **FIELDS)
        for number in range(args.pairs):
            for way, found in (beside_server if args.server else alone)(Path(name), number).items():
                measured = {"first step, s": found["first"], "a step, s": found["step"]}
                figures[way].append(measured | {"in all, s": found["total"], "GiB": found["memory"]})
                print(f"{way}: {measured}", flush=True)
    rows = []
    for what in figures["own"][0]:
        own, stock = (statistics.median(run[what] for run in figures[way]) for way in ("own", "stock"))
        rows.append({"median": what, "this project": own, "TRL": stock, "ratio": own / stock})
    show(rows, args.output)


if __name__ == "__main__":
    parts = {"--stock": run_stock, "--rank": rank}
    parts[sys.argv[1]](*sys.argv[2:]) if sys.argv[1:] and sys.argv[1] in parts else main()
