"""Seconds and memory of a weight sync: `python benchmarks/sync.py [--output FILE.json]`.

Two ZeRO-3 ranks on the CPU and random weights. All weights of a model, a LoRA adapter that is merged into it, and the
adapter alone go to a server that takes the files and does not read them: vLLM's part is not in these figures.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pandas
import yaml
from helpers import ROOT
from table_server import TableServer

SHAPES = {  # layers, width, width of the MLP, heads, key-value heads, vocabulary
    "1 M": (4, 128, 384, 4, 2, 1536),  # the quickstart's
    "135 M": (30, 576, 1536, 9, 3, 49_152),  # SmolLM2-135M's
    "0.5 B": (24, 896, 4864, 14, 2, 151_936),  # Qwen2.5-0.5B's
}
LORA = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_r", "16"]
WAYS = {
    "all weights": ["--weight_sync", "disk"],
    "LoRA, merged": ["--weight_sync", "disk", *LORA],
    "LoRA, adapter": ["--weight_sync", "adapter", *LORA],
}
GIB = 2**30


def make_model(folder: Path, shape: tuple) -> None:
    """Write a Qwen2 model with random weights."""
    from tiny_models import TEMPLATE, make_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layers, width, inner, heads, key_value_heads, vocabulary = shape
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


def rank(model: str, folder: str, url: str, *flags: str) -> None:
    """Sync three times as one of the ranks, before anything is trained. The main one writes what each took."""
    from grpo_launcher.slow_imports import skip_deepspeed_ops, skip_vllm

    skip_deepspeed_ops()
    skip_vllm()
    from table_server import train_beside

    from grpo_launcher import weight_sync
    from grpo_launcher.trainer import Trainer

    figures, save_file = [], weight_sync.save_file

    def save(tensors, *args):
        figures[-1]["bytes"] += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, *args)

    def measure(self, send_weights):
        for _ in range(3):
            figures.append({"bytes": 0, "between": _memory("VmRSS")})
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            start = time.monotonic()
            send_weights()
            figures[-1] |= {"seconds": time.monotonic() - start, "peak": _memory("VmHWM")}
        if self.is_world_process_zero():
            Path(folder, "sync.json").write_text(json.dumps(figures), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        os._exit(0)

    weight_sync.save_file, Trainer._sync = save, measure
    train_beside(TableServer.at(url), Path(model), Path(folder), *flags)


def _memory(name: str) -> float:
    """Return a figure of this process in GiB: VmRSS, or its peak VmHWM."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / GIB


def measure(model: Path, folder: Path, flags: list[str]) -> dict:
    """Return the figures of the last sync: in the first memory still grows."""
    machine = yaml.safe_load((ROOT / "zero3.yaml").read_text())
    machine |= {"use_cpu": True, "mixed_precision": "no", "num_processes": 2, "main_process_port": 0}
    (folder / "machine.yaml").write_text(yaml.safe_dump(machine))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "machine.yaml")]
    with TableServer() as server:
        command += [__file__, "--rank", str(model), str(folder), server.url, *flags]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    sync = json.loads((folder / "sync.json").read_text())[-1]
    return {
        "sent, MiB": sync["bytes"] / 2**20,
        "seconds": sync["seconds"],
        "between, GiB": sync["between"],
        "peak, GiB": sync["peak"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=[*SHAPES], help="models (default: all)")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    args = parser.parse_args()
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as name:
            model = Path(name) / "model"
            make_model(model, SHAPES[size])
            whole = (model / "model.safetensors").stat().st_size / GIB
            for way, flags in WAYS.items():
                if size == "0.5 B" and way == "all weights":
                    continue  # two ranks with gradients and Adam's moments need more than 24 GiB
                folder = Path(name) / way.replace(", ", "-").replace(" ", "-")
                folder.mkdir()
                row = {"parameters": size, "way": way} | measure(model, folder, flags)
                row |= {
                    "s per GiB of model": row["seconds"] / whole,
                    "peak / between": row["peak, GiB"] / row["between, GiB"],
                }
                rows.append(row)
                print(f"{size}, {way}: {row['seconds']:.2f} s", flush=True)
    print(pandas.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    rank(*sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
