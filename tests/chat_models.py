"""Random models, adapters, runs and rows for the tests of chat and comparison."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import SYSTEM, make_adapter, make_encoder_model, make_model, make_run
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from grpo_launcher.chat.models import ADAPTER_WEIGHTS
from grpo_launcher.seq2seq import model_class

TOKENS = 24
PREFIX = "summarize: "
WHOLE, LORA, SHORT = "trainOutput/whole/1", "trainOutput/lora/1", "trainOutput/short/1"


def chat(text: str) -> list[dict]:
    """Return a prompt of a run's dataset."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def write_rows(folder: Path, rows: list[dict]) -> None:
    """Write the test split of a dataset."""
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))


def make_checkpoints(folder: Path) -> None:
    """Write models, a run of whole models, one of adapters and one of T5, and rows."""
    make_model(folder / "base", 0)
    make_model(folder / "narrow", 3, context=192)
    make_adapter(folder / "adapter", folder / "base", 1, named="base")
    make_run(
        folder / WHOLE, "base", dataset_name="rows", reward_kwargs='{"length_reward": {"target": 50}}', temperature=0.5
    )
    for seed, name in enumerate(["checkpoint-1", "checkpoint-2", "checkpoint-10", "final-checkpoint"], start=1):
        make_model(folder / WHOLE / name, seed, context=8192)
    make_run(folder / LORA, "base", dataset_name="rows")
    for seed, name in enumerate(["checkpoint-1", "final-checkpoint"]):
        make_adapter(folder / LORA / name, folder / "base", seed, named="base")
    for name in (f"{WHOLE}/checkpoint-1", f"{WHOLE}/checkpoint-2", f"{LORA}/checkpoint-1"):
        (folder / name / "trainer_state.json").write_text("{}")
    (folder / WHOLE / "best-checkpoint").symlink_to("checkpoint-2")
    for seed, kind in enumerate(("t5", "bart")):
        make_encoder_model(folder / kind, kind, positions=40)
        torch.manual_seed(seed)
        model = model_class(AutoConfig.from_pretrained(folder / kind)).from_pretrained(folder / kind)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.5)  # so that it writes something else to each prompt
        model.save_pretrained(folder / kind)
        make_adapter(folder / f"{kind}-adapter", folder / kind, seed, named=kind)
    write_rows(
        folder / "rows",
        [{"prompt": chat(f"Where is cat {n}?" * (1 + 30 * (n == 5))), "reference": f"roof {n}"} for n in range(6)],
    )
    write_rows(
        folder / "texts", [{"prompt": f"{PREFIX}A cat.{' It sat.' * n}", "reference": "A cat sat."} for n in range(4)]
    )
    (folder / "empty").mkdir()
    Dataset.from_dict({"prompt": ["A cat."]}).select([]).to_parquet(folder / "empty/test.parquet")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """Return the folder of make_checkpoints, made once a session."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_checkpoints(folder)
    return folder


@pytest.fixture
def place(checkpoints, tmp_path, monkeypatch) -> Path:
    """Go to a folder in which the checkpoints are at hand. What a test writes stays apart."""
    for path in checkpoints.iterdir():
        if path.name == "trainOutput":
            shutil.copytree(path, tmp_path / path.name, symlinks=True)
        else:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoil(kind: str) -> str:
    """Write a checkpoint that cannot generate, and return its name."""
    if kind == "half written":
        return f"{WHOLE}/checkpoint-10"
    if kind == "weights cut short":
        shutil.copytree(f"{WHOLE}/checkpoint-1", "bad")
        weights = Path("bad/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "adapter without base":
        make_adapter(Path("bad"), Path("base"), 0, named="moved/away")
    elif kind == "adapter of another model":
        make_adapter(Path("bad"), Path("base"), 0)
        weights = load_file(f"bad/{ADAPTER_WEIGHTS}")
        name = next(name for name in weights if "layers.1.mlp.down_proj.lora_A" in name)
        save_file({**weights, name: weights[name][:, :-1].contiguous()}, f"bad/{ADAPTER_WEIGHTS}")
    elif kind == "no checkpoint":
        Path("bad").mkdir()
    return "bad"


def generated(name: str, prompt, adapter: str | None = None, tokens: int = TOKENS) -> list[int]:
    """Return the greedy completion of model.generate itself to one prompt alone."""
    tokenizer, config = AutoTokenizer.from_pretrained(name), AutoConfig.from_pretrained(name)
    model = model_class(config).from_pretrained(name)
    if config.is_encoder_decoder:  # without the beams that a checkpoint's own file asks for
        start = config.decoder_start_token_id
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=start)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(prompt, **options)
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)[0].tolist()
    return ids[1:] if config.is_encoder_decoder else ids[inputs["input_ids"].shape[1] :]
