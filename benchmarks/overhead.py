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
from common import ROOT, cpu_environment, machine_config, make_model, parser, show, watch

STEPS = 16
RECIPE = {
    "reward_funcs": ["rewards.length.length_reward"],
    "max_steps": STEPS,
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "max_completion_length": 64,
    "learning_rate": 1e-4,
    "beta": 0.04,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "log_completions": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}
OWN_STEP, STOCK_STEP = r"^step +\d+/", r"'step_time'"


def prepare(folder: Path) -> None:
    """Write model, rows and the two recipes."""
    make_model(folder / "model", "1 M")
    prompts = [{"prompt": [{"role": "user", "content": f"Tell me about number {number}."}]} for number in range(64)]
    from datasets import Dataset

    (folder / "rows").mkdir()
    Dataset.from_list(prompts).to_parquet(folder / "rows/train.parquet")
    recipe = RECIPE | {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "rows")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def alone(folder: Path, number: int) -> dict[str, dict]:
    """Run both without a server."""
    config = ["--config", str(folder / "recipe.yaml"), "--output_dir"]
    own = [sys.executable, str(ROOT / "train.py"), *config, str(folder / f"own-{number}"), "--sample_every", "0"]
    stock = [str(Path(sys.executable).with_name("trl")), "grpo", *config, str(folder / f"stock-{number}")]
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
    from grpo_launcher.launch.hardware import free_ports

    model = yaml.safe_load(Path(recipe).read_text())["model_name_or_path"]
    (port,) = free_ports(1)
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    serve += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--max-model-len", "256"]
    serve += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--generation-config", "vllm"]
    serve += ["--worker-extension-cls", "grpo_launcher.weight_sync_worker.DiskSyncWorker"]
    environment = cpu_environment() | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "TORCHDYNAMO_DISABLE": "1"}
    train = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    train += [str(machine_config(Path(recipe).parent, 2)), __file__, "--rank", "--config", recipe, *flags]
    train += ["--vllm_server_base_url", f"http://127.0.0.1:{port}"]
    with (
        open(os.devnull, "w") as nowhere,
        subprocess.Popen(serve, env=environment, stdout=nowhere, stderr=nowhere) as server,
    ):
        status = subprocess.run(train, env=environment).returncode
        server.terminate()
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
        prepare(Path(name))
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
