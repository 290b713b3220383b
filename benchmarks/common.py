"""Shared by the benchmarks: models with random weights, commands whose lines are timed, ranks, and tables."""

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pandas
import psutil
import yaml
from helpers import write_accelerate_config

from grpo_launcher.launch.hardware import free_ports, is_port_free
from grpo_launcher.slow_imports import skip_deepspeed_ops, skip_vllm

SHAPES = {  # layers, width, width of the MLP, heads, key-value heads, vocabulary
    "1 M": (4, 128, 384, 4, 2, 1536),  # the quickstart's
    "8 M": (6, 256, 1024, 4, 2, 8192),
    "32 M": (8, 512, 1536, 8, 4, 16_384),
    "135 M": (30, 576, 1536, 9, 3, 49_152),  # SmolLM2-135M's
    "0.5 B": (24, 896, 4864, 14, 2, 151_936),  # Qwen2.5-0.5B's
    "1.5 B": (28, 1536, 8960, 12, 2, 151_936),  # Qwen2.5-1.5B's
}
GIB = 2**30
RECIPE = {  # the part that every timed run has, ours and TRL's
    "reward_funcs": ["rewards.length.length_reward"],
    "num_generations": 8,
    "logging_steps": 1,
    "log_completions": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}
OWN_STEP, STOCK_STEP = r"^step +\d+/", r"'step_time'"  # the line of a step, of this project and of TRL
TRL = str(Path(sys.executable).with_name("trl"))


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the option that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="file for the figures, as JSON")
    return made


def show(rows: list[dict], output: Path | None) -> None:
    """Print rows as a table, and write them as JSON where that is asked for."""
    print(pandas.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format), flush=True)
    if output:
        output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def make_model(folder: Path, shape: str) -> None:
    """Write a Qwen2 model of random weights, and a tokenizer whose vocabulary is as large as the model's."""
    from tiny_models import TEMPLATE, make_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layers, width, inner, heads, key_value_heads, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer(TEMPLATE).save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    known = tokenizer["model"]["vocab"]
    known |= {f"<{number}>": number for number in range(max(known.values()) + 1, vocabulary)}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def table_server():
    """Import the tests' server that answers from a table, and TRL without vLLM, as a run beside a server does."""
    skip_deepspeed_ops()
    skip_vllm()
    import table_server

    return table_server


def write_recipe(folder: Path, shape: str, prompts: list[str], **fields) -> Path:
    """Write a model, rows, and the recipe that names them."""
    from datasets import Dataset

    make_model(folder / "model", shape)
    (folder / "rows").mkdir()
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    Dataset.from_list(rows).to_parquet(folder / "rows/train.parquet")
    recipe = RECIPE | fields | {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "rows")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@contextlib.contextmanager
def vllm_server(model: str, flags: list[str], environment: dict[str, str]):
    """Start a vLLM server that gets its weights as files. Yields its address once it answers."""
    (port,) = free_ports(1)
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *flags]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm"]
    serve += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    serve += ["--worker-extension-cls", "grpo_launcher.weight_sync_worker.DiskSyncWorker"]
    environment = environment | {"VLLM_SERVER_DEV_MODE": "1"}
    log = Path(model).parent / "server.log"
    with (
        open(log, "wb") as output,
        subprocess.Popen(serve, env=environment, stdout=output, stderr=subprocess.STDOUT) as server,
    ):
        try:
            while is_port_free(port):
                if server.poll() is not None:
                    sys.exit(f"{log.read_text()[-4000:]}\nThe vLLM server ended with {server.returncode}.")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def cpu_environment() -> dict[str, str]:
    """Return the environment in which the launcher starts its ranks on two cores."""
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def ranks_command(script: str, folder: Path, *arguments: str) -> list[str]:
    """Return the command that runs a script as two ZeRO-3 ranks on the CPU, with `--rank` before the arguments."""
    config = folder / "machine.yaml"
    write_accelerate_config(config, "zero3", 2)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, script, "--rank", *arguments]


def run_ranks(script: str, folder: Path, *arguments: str) -> None:
    """Run a script as two ranks, and end the benchmark with what they said where they fail."""
    command = ranks_command(script, folder, *arguments)
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])


def status(name: str) -> float:
    """Return a figure of this process in GiB: VmRSS, or its peak VmHWM."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / GIB


def watch(command: list[str], pattern: str, **options) -> dict:
    """Run a command and time its lines.

    Args:
        command: the benchmark ends with its output where it fails.
        pattern: regular expression of the lines that count.
        options: of subprocess.Popen.

    Returns:
        first: seconds to the first such line. step: median of the seconds from one to the next. total: seconds of
        the whole command. memory: GiB that it and its children held at most, looked at every two seconds.
    """
    start, times, said, peak = time.monotonic(), [], [], 0.0
    options["env"] = options.get("env", os.environ) | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)

    def read():
        for line in process.stdout:
            said.append(line)
            if re.search(pattern, line):
                times.append(time.monotonic() - start)
                print(f"{times[-1]:.1f} s: {line.strip()[:100]}", file=sys.stderr)

    reader = threading.Thread(target=read)
    reader.start()
    while process.poll() is None:
        peak = max(peak, _memory_of(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)  # counting pages takes time itself
    total = time.monotonic() - start
    reader.join()
    if process.returncode:
        sys.exit("".join([*said[-40:], f"{command} ended with {process.returncode}"]))
    steps = [later - sooner for sooner, later in itertools.pairwise(times)]
    step = statistics.median(steps) if steps else None
    return {"first": min(times, default=None), "step": step, "total": total, "memory": peak}


def _memory_of(pid: int) -> float:
    """Return what a process and its children hold, in GiB."""
    held = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            held += process.memory_full_info().pss
    except (psutil.Error, OSError):  # it has just ended
        pass
    return held / GIB
