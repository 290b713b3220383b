"""Small models, an adapter, a run and rows, made in seconds; and compare_checkpoints.py in a folder of its own."""

import json
import random
import shutil
from pathlib import Path

import yaml
from datasets import Dataset
from pyarrow import parquet
from tiny_models import make_adapter, make_model

import compare_checkpoints
from grpo_launcher.chat.checkpoints import ADAPTER

WORDS = ["the", "boss", "broke", "my", "piano", "in", "garden", "last", "week", "and", "will", "not", "pay", "for", "it", "she", "said"]
TOKENS = 24


def sentence(rng: random.Random, count: int = 12) -> str:
    """Some words."""
    return " ".join(rng.choices(WORDS, k=count))


def make(folder: Path) -> Path:
    """Two models, an adapter on the first, a run of three checkpoints, and rows, one of which is long."""
    rng = random.Random(0)
    for seed, name in enumerate(("one", "two", "short")):
        make_model(folder / name, seed, context=192 if name == "short" else 512)
    make_adapter(folder / "adapter", folder / "one", seed=1)
    run = folder / "trainOutput/made/1"
    for name, source in {"checkpoint-2": "two", "final-checkpoint": "short"}.items():
        shutil.copytree(folder / source, run / name)
    (run / "checkpoint-2/trainer_state.json").write_text("{}")
    recipe = {"model_name_or_path": "one", "dataset_name": "data", "max_completion_length": TOKENS, "max_steps": 2}
    rewards = {"reward_funcs": ["rewards.length.length_reward"], "reward_kwargs": {"length_reward": {"target": 50}}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | rewards))

    def row(count: int = 12) -> dict:
        return {"prompt": [{"role": "user", "content": sentence(rng, count)}], "reference": sentence(rng)}

    (folder / "data").mkdir()
    Dataset.from_list([row(rng.randint(4, 30)) for _ in range(6)] + [row(80)]).to_parquet(folder / "data/test.parquet")
    Dataset.from_list([row() for _ in range(3)]).to_parquet(folder / "data/train.parquet")
    (folder / "empty").mkdir()
    Dataset.from_list([row()]).select([]).to_parquet(folder / "empty/test.parquet")
    return folder


class Compare:
    """The command in a folder of its own, with all that was made at hand."""

    def __init__(self, folder: Path, capfd):
        self.folder, self.capfd = folder, capfd

    def __call__(self, *argv: str) -> tuple[int, str]:
        """Exit status, and what was printed."""
        self.capfd.readouterr()
        try:
            status = compare_checkpoints.main([*argv, *([] if "--max_new_tokens" in argv or "--help" in argv else ["--max_new_tokens", str(TOKENS)])])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print("" if isinstance(end.code, int) else end.code)
        return status, "".join(self.capfd.readouterr())

    def kept(self) -> list[dict]:
        """The rows of the file of replies."""
        return parquet.read_table(self.folder / "trainOutput/completions.parquet").to_pylist()


def spoil(folder: Path, kind: str) -> str:
    """A checkpoint that cannot answer."""
    bad = folder / "bad"
    if kind == "weights cut short":
        shutil.copytree(folder / "two", bad)
        (bad / "model.safetensors").write_bytes((folder / "two/model.safetensors").read_bytes()[:1000])
    elif kind == "base gone":
        shutil.copytree(folder / "adapter", bad)
        config = json.loads((bad / ADAPTER).read_text())
        (bad / ADAPTER).write_text(json.dumps(config | {"base_model_name_or_path": "moved/away"}))
    elif kind == "still being written":
        (folder / "trainOutput/made/1/checkpoint-2/trainer_state.json").unlink()
        return "trainOutput/made/1/checkpoint-2"
    elif kind == "no checkpoint":
        bad.mkdir()
    elif kind == "adapter of another model":
        shutil.copytree(folder / "adapter", bad)
        from safetensors.torch import load_file, save_file

        weights = load_file(bad / "adapter_model.safetensors")
        name = next(name for name in weights if "layers.1.mlp.down_proj.lora_A" in name)  # all others fit
        save_file({**weights, name: weights[name][:, :-1].contiguous()}, bad / "adapter_model.safetensors")
    return "bad"
