"""Encoder-decoder models in real runs: several ranks, a kill in the middle, and the command that makes the table."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, read_metrics, run_python, write_accelerate_config
from tiny_models import make_encoder_model

ROWS = [
    {
        "prompt": f"summarize: The cat {'sat and ' * (number % 5)}waited for number {number}.",
        "reference": f"The cat waited, {number}.",
    }
    for number in range(32)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with random T5 and BART models, rows and a recipe."""
    folder = tmp_path_factory.mktemp("seq2seq")
    for kind in ("t5", "bart"):
        make_encoder_model(folder / kind, kind, positions=512)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    recipe = {
        "dataset_name": "rows.jsonl",
        "reward_funcs": ["rewards.length.length_reward"],
        "beta": 0.04,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def first_step(home: Path, ranks: int) -> dict:
    """Return the first metrics of a run of T5 under ZeRO-3 in which every completion is fixed."""
    name = f"fixed-{ranks}"
    script = [str(ROOT / "tests/cpu/train_fixed_completions.py"), "--config", "mine.yaml"]
    script += ["--model_name_or_path", "t5", "--output_dir", name, "--max_steps", "1"]
    script += ["--per_device_train_batch_size", str(16 // ranks)]
    if ranks > 1:
        write_accelerate_config(home / f"{name}.yaml", "zero3", ranks)
        script = ["-m", "accelerate.commands.launch", "--config_file", f"{name}.yaml", *script]
    run_python(*script, cwd=home, DS_ACCELERATOR="cpu")
    assert (home / name / "final-checkpoint/README.md").exists()
    return read_metrics(home / name)[0]


def test_two_ranks_do_what_one_does(home):
    """Given the same completions: the same rewards, loss and gradient in the first step, and no KL."""
    one, two = first_step(home, 1), first_step(home, 2)
    assert abs(one["loss"]) > 1e-3 and two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert one["reward"] == pytest.approx(two["reward"], abs=1e-6)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    assert [one["kl"], two["kl"]] == pytest.approx([0, 0], abs=1e-9)


def test_one_command_makes_the_table_and_goes_on_after_a_kill(home, launch):
    """SFT, GRPO with LoRA behind it, GRPO on the base, and their comparison on three splits, with BART on two ranks.

    Killed in the second run. The same command goes on there to the end, and does not train the first again.
    """
    output = home / "table"
    (output / "data").mkdir(parents=True)
    for kind in ("t5", "bart"):
        (output / f"data/quickstart-{kind}").symlink_to(home / kind)
    command = ["-m", "grpo_launcher.quickstart.summaries", "--model", "bart", "--output", str(output), "--limit", "4"]
    command += ["--max_steps", "3", "--save_steps", "1", "--max_completion_length", "8"]
    command += ["--eval_strategy", "steps", "--eval_steps", "3", "--eval_rows", "4"]
    command = [sys.executable, *command, "--per_device_train_batch_size", "8"]
    run = launch(home, command=command)
    run.wait_for("step 2/3  reward")
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert run.leftovers(60) == []
    again = launch(home, command=command).finish()
    assert re.search(r"from checkpoint-[12]", again.text()) and "_sft.yaml" not in again.text()
    assert "generation by transformers on every device" in again.text()
    lines = read_metrics(output / "grpo-lora")
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3]
    assert "eval_reward" in lines[-1] and abs(lines[0]["kl"]) < 1e-9 and lines[1]["kl"] > 1e-6
    adapter = json.loads((output / "grpo-lora/final-checkpoint/adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_2_SEQ_LM"
    result = json.loads((output / "comparison.json").read_text())
    assert list(result["splits"]) == ["train", "validation", "test"] and not result["failed"]
