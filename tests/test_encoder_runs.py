"""Models with an encoder in real runs: several ranks, a kill in the middle, real posts, and the command that makes the table."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, test_data
from tiny_models import make_encoder_model
from transformers import AutoModelForSeq2SeqLM

pytestmark = pytest.mark.slow
ROWS = [
    {"prompt": f"summarize: The cat {'sat and ' * (number % 5)}waited for number {number}.", "reference": f"The cat waited, {number}."} for number in range(32)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with t5, bart and rows."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("t5", "bart"):
        make_encoder_model(folder / kind, kind)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    fields = {"dataset_name": "rows.jsonl", "reward_funcs": ["rewards.length.length_reward"], "beta": 0.04, "max_completion_length": 12}
    fields["guards"] = {"completions/clipped_ratio": None}  # random models end no reply, and nothing would be saved
    (folder / "mine.yaml").write_text(yaml.safe_dump(fields | {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False}))
    return folder


@pytest.fixture(scope="module")
def first_step(home):
    """first_step(kind, parallel or None, ranks) → the first line of metrics.jsonl of train.py where every run gets the same replies."""
    made = {}

    def train(kind: str, parallel: str | None, ranks: int) -> dict:
        if (kind, parallel) not in made:
            name = f"{kind}-{parallel}"
            script = [str(ROOT / "tests/train_fixed_replies.py"), "--config", "mine.yaml", "--model_name_or_path", kind, "--output_dir", name]
            script += ["--max_steps", "1", "--per_device_train_batch_size", str(16 // ranks)]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            if parallel:
                machine = yaml.safe_load((ROOT / f"{parallel}.yaml").read_text()) | {"use_cpu": True, "mixed_precision": "no", "num_processes": ranks}
                (home / f"{name}.yaml").write_text(yaml.safe_dump(machine | {"main_process_port": 0}))
                (home / name).mkdir()
                (home / name / "recipe.yaml").write_text((home / "mine.yaml").read_text() + "provenance: {versions: {}, system_prompt: null}\n")
                script = ["-m", "accelerate.commands.launch", "--config_file", f"{name}.yaml", *script]
            done = subprocess.run([sys.executable, *script], cwd=home, env=environment, capture_output=True, text=True, timeout=200)
            metrics = home / name / "metrics.jsonl"
            assert metrics.exists(), done.stderr[-3000:]
            made[kind, parallel] = json.loads(metrics.read_text().splitlines()[0])
        return made[kind, parallel]

    return train


@pytest.mark.parametrize("parallel", ["zero3", "ddp"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_two_ranks_do_what_one_does(kind, parallel, first_step):
    """Given the same replies: the same rewards, loss and gradient in the first step, and no KL."""
    one, two = first_step(kind, None, 1), first_step(kind, parallel, 2)
    assert abs(one["loss"]) > 1e-3 and two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert one["reward"] == pytest.approx(two["reward"], abs=1e-6) and one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    assert [one["kl"], two["kl"]] == pytest.approx([0, 0], abs=1e-9)


def test_a_killed_run_resumes(home, launch):
    """ZeRO-3 × 2 with LoRA and evaluation, killed behind its second step; the same command with --resume goes on to the end."""
    flags = ["--model_name_or_path", "bart", "--output_dir", "killed", "--save_steps", "2", "--max_steps", "6", "--per_device_train_batch_size", "4"]
    flags += ["--use_peft", "true", "--lora_target_modules", "all-linear", "--eval_strategy", "steps", "--eval_steps", "6", "--eval_rows", "4"]
    flags += ["--dataset_test_split", "train"]
    run = launch(home, str(home / "mine.yaml"), *flags)
    run.wait_for("step 3/6")
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert run.leftovers(30) == []
    again = launch(home, str(home / "mine.yaml"), *flags, "--resume")
    assert again.finish(200) == 0, again.text()[-4000:]
    lines = [json.loads(line) for line in (home / "killed/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3, 4, 5, 6] and re.search(r"from checkpoint-[24]", again.text())
    assert "eval_reward" in lines[-1] and abs(lines[0]["kl"]) < 1e-9 and lines[1]["kl"] > 1e-6
    assert "generation by transformers on each, as the model has an encoder" in again.text()
    assert json.loads((home / "killed/final-checkpoint/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_real_posts_by_the_recipe_as_written(home, launch):
    """Two steps and an evaluation of configs/summarize_t5.yaml under ZeRO-3, with only the model swapped, on real posts as articles."""
    command = [sys.executable, str(ROOT / "process_dataset.py"), "summarization", "--source", str(test_data("tldr/tldr.jsonl")), "--prefix", "summarize: "]
    command += ["--tokenizer", "t5", "--too_long", "cut", "--article", "prompt", "--summary", "completion", "--limit", "100"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0 and "prompts over 512 tokens lose their end" in done.stdout, done.stderr
    run = launch(home, str(ROOT / "configs/summarize_t5.yaml"), "--model_name_or_path", "t5", "--max_steps", "2", "--eval_rows", "8")
    assert run.finish(300) == 0, run.text()[-4000:]
    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 2] and abs(lines[0]["kl"]) < 1e-9 and "eval_rewards/rouge_reward/mean" in lines[2]
    whole = AutoModelForSeq2SeqLM.from_pretrained(run.run_folder() / "final-checkpoint")
    assert whole.config.dropout_rate == 0 and run.leftovers() == []


def test_one_command_makes_the_table(home, tmp_path):
    """Four rows by three splits, with intervals and tests; a second call makes nothing anew but the table."""
    output = tmp_path / "table"
    (output / "data").mkdir(parents=True)
    for kind in ("t5", "bart"):
        shutil.copytree(home / kind, output / f"data/quickstart-{kind}")
    command = [sys.executable, "-m", "grpo_launcher.quickstart.summaries", "--output", str(output), "--limit", "8", "--max_steps", "1", "--max_completion_length", "8"]
    command += ["--per_device_train_batch_size", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads((output / "comparison.json").read_text())
    assert [*result["splits"]] == ["train", "validation", "test"] and result["failed"] == {}
    for of in result["splits"].values():
        figures = of["metrics"]["rouge_reward"]
        assert len(figures) == 4 and sum("p_holm" in one for one in figures.values()) == 3
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and again.stdout.count("launch_train.sh") == 0 and "0 replies to draw" in again.stdout
