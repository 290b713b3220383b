"""Encoder-decoder models in real runs: several ranks, a kill in the middle, and the command that makes the table."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, read_metrics, run_python
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
        make_encoder_model(folder / kind, kind)
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


@pytest.fixture(scope="module")
def first_step(home):
    """Return a function that gives the first metrics of a run in which every completion is fixed."""
    made = {}

    def train(kind: str, parallel: str | None) -> dict:
        if (kind, parallel) in made:
            return made[kind, parallel]
        ranks = 2 if parallel else 1
        name = f"{kind}-{parallel}"
        script = [str(ROOT / "tests/cpu/train_fixed_completions.py"), "--config", "mine.yaml"]
        script += ["--model_name_or_path", kind, "--output_dir", name, "--max_steps", "1"]
        script += ["--per_device_train_batch_size", str(16 // ranks)]
        if parallel:
            machine = yaml.safe_load((ROOT / f"{parallel}.yaml").read_text())
            machine |= {"use_cpu": True, "mixed_precision": "no", "num_processes": ranks, "main_process_port": 0}
            (home / f"{name}.yaml").write_text(yaml.safe_dump(machine))
            script = ["-m", "accelerate.commands.launch", "--config_file", f"{name}.yaml", *script]
        run_python(*script, cwd=home, DS_ACCELERATOR="cpu", OMP_NUM_THREADS=1)
        made[kind, parallel] = read_metrics(home / name)[0]
        return made[kind, parallel]

    return train


@pytest.mark.parametrize(("kind", "parallel"), [("t5", "zero3"), ("bart", "ddp")])
def test_two_ranks_do_what_one_does(kind, parallel, first_step):
    """Given the same completions: the same rewards, loss and gradient in the first step, and no KL."""
    one, two = first_step(kind, None), first_step(kind, parallel)
    assert abs(one["loss"]) > 1e-3 and two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert one["reward"] == pytest.approx(two["reward"], abs=1e-6)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    assert [one["kl"], two["kl"]] == pytest.approx([0, 0], abs=1e-9)


def test_a_killed_run_resumes(home, launch):
    """ZeRO-3 with LoRA and evaluation, killed in its third step. The same command with --resume goes on to the end."""
    flags = ["--model_name_or_path", "bart", "--output_dir", "killed", "--save_steps", "2", "--max_steps", "6"]
    flags += ["--per_device_train_batch_size", "4", "--use_peft", "true", "--lora_target_modules", "all-linear"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "6", "--eval_rows", "4", "--dataset_test_split", "train"]
    run = launch(home, str(home / "mine.yaml"), *flags)
    run.wait_for("step 3/6")
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert run.leftovers(60) == []
    again = launch(home, str(home / "mine.yaml"), *flags, "--resume").finish()
    lines = read_metrics(home / "killed")
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3, 4, 5, 6]
    assert re.search(r"from checkpoint-[24]", again.text())
    assert "eval_reward" in lines[-1] and abs(lines[0]["kl"]) < 1e-9 and lines[1]["kl"] > 1e-6
    assert "generation by transformers on every device" in again.text()
    adapter = json.loads((home / "killed/final-checkpoint/adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_2_SEQ_LM"


def test_one_command_makes_the_table(home, tmp_path):
    """SFT, GRPO behind it, GRPO on the base, and their comparison on three splits. A second call trains nothing."""
    output = tmp_path / "table"
    (output / "data").mkdir(parents=True)
    for kind in ("t5", "bart"):
        (output / f"data/quickstart-{kind}").symlink_to(home / kind)
    command = ["-m", "grpo_launcher.quickstart.summaries", "--output", output, "--limit", "8", "--max_steps", "1"]
    command += ["--max_completion_length", "8", "--per_device_train_batch_size", "8"]
    run_python(*command, cwd=tmp_path)
    result = json.loads((output / "comparison.json").read_text())
    assert list(result["splits"]) == ["train", "validation", "test"] and not result["failed"]
    again = run_python(*command, cwd=tmp_path)
    assert "launch_train.sh" not in again.stdout
