"""Recipes with the quickstart's model in place of a large one, on real posts and questions of TEST_DATA."""

import json
from pathlib import Path

import pandas
import pytest
import torch
from helpers import ROOT, is_in_sync, read_metrics, run_here, run_python, test_data
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def data(module_workplace) -> Path:
    """A folder with the base model and real posts and questions, prepared by the command."""
    options = ["--tokenizer", "data/quickstart-model", "--limit", "100", "--max_prompt_length", "700"]
    for name, source in {"tldr": "tldr/tldr.jsonl", "mcq": "mcq/tmmlu.csv"}.items():
        where = ["--source", test_data(source), "--output", name]
        run_here(f"{ROOT}/process_dataset.py", name, *where, *options, cwd=module_workplace)
    return module_workplace


@pytest.fixture(scope="module")
def train(data, launch, server_url):
    """Return a function that gives the finished run of a recipe with flags, beside the server that tests share."""

    def start(recipe: str, *flags: str):
        common = ["--model_name_or_path", "data/quickstart-model", "--gradient_accumulation_steps", "1"]
        common += ["--gradient_checkpointing", "false", "--warmup_steps", "0", "--learning_rate", "1e-3"]
        common += ["--lr_scheduler_type", "constant", "--sample_every", "0"]
        common += [] if recipe == "tldr_qlora" else ["--vllm_server_base_url", server_url]
        run = launch(data, str(ROOT / f"configs/{recipe}.yaml"), *common, *flags).finish()
        assert (run.run_folder() / "final-checkpoint/README.md").exists() and run.leftovers() == []
        return run

    return start


def completions_of(run_folder: Path) -> pandas.DataFrame:
    """All logged completions of a run."""
    return pandas.concat(map(pandas.read_parquet, (run_folder / "completions").glob("*.parquet")))


FOUR_BIT_REWARD = """
import gc

import bitsandbytes


def length(completions, *, log_metric, **kwargs):
    layers = [layer for layer in gc.get_objects() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    log_metric("four_bit_layers", len(layers))
    return [float(len(completion[-1]["content"])) for completion in completions]
"""


def test_four_bit_weights_are_trained_on(train, data):
    """QLoRA under DDP on bitsandbytes' CPU kernels. The layers are counted while it runs."""
    (data / "mine.py").write_text(FOUR_BIT_REWARD)
    flags = ["--dataset_name", "tldr", "--max_steps", "1", "--max_completion_length", "16"]
    flags += ["--per_device_train_batch_size", "4"]
    run = train("tldr_qlora", *flags, "--reward_funcs", "mine.py:length", "--reward_kwargs", "{}")
    assert "2 DDP ranks on the CPU; generation by transformers" in run.text()
    for line in run.metrics():
        assert line["four_bit_layers"] == 28 and line["grad_norm"] > 0, "seven in each of four layers"
    adapter = load_file(run.run_folder() / "final-checkpoint/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}, "bfloat16 would lose small updates"


def test_the_reference_follows_and_the_best_checkpoint_stays(train):
    """After a sync with the whole policy no KL is left. The best of three evaluations stays, where two may."""
    run = train(
        "tldr_ref_sync",
        *("--dataset_name", "tldr", "--max_steps", "6", "--max_completion_length", "48"),
        *("--per_device_train_batch_size", "8", "--ref_model_sync_steps", "3", "--ref_model_mixup_alpha", "1"),
        *("--eval_steps", "2", "--eval_rows", "10", "--save_steps", "2", "--save_total_limit", "2"),
        *("--metric_for_best_model", "eval_rewards/rouge_reward/mean"),
    )
    folder, lines = run.run_folder(), run.metrics()
    kl = {line["step"]: line["kl"] for line in lines if "kl" in line}
    assert kl[2] > 1e-3 and kl[3] > 1e-3 and kl[4] < 1e-6 < kl[5], (
        "the reference stood, then moved to the policy of step 3"
    )
    figures = {line["step"]: line["eval_rewards/rouge_reward/mean"] for line in lines if "eval_reward" in line}
    assert list(figures) == [2, 4, 6]
    best = max(figures, key=figures.get)
    assert (folder / "best-checkpoint").resolve() == folder / f"checkpoint-{best}"
    steps = {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}
    assert len(steps) == 2 and {best, 6} <= steps, "the best and the last"
    sizes = completions_of(folder).groupby("step").size().to_dict()
    assert sizes == dict.fromkeys(range(1, 7), 16), "the evaluation's completions did not replace these"
    assert is_in_sync(lines)


def test_multiple_choice_is_trained_and_evaluated(data):
    """Real questions, in one process: every measure has its name, and only the weighted rewards count."""
    command = [ROOT / "train.py", "--config", ROOT / "configs/mcq_refusal.yaml", "--dataset_name", "mcq"]
    command += ["--model_name_or_path", "data/quickstart-model", "--gradient_accumulation_steps", "1"]
    command += ["--gradient_checkpointing", "false", "--max_steps", "2", "--max_completion_length", "32"]
    command += ["--output_dir", "choices", "--eval_steps", "2", "--eval_rows", "8", "--save_steps", "2"]
    run_python(*command, cwd=data)
    *lines, evaluation = read_metrics(data / "choices")
    for line, prefix in [*((line, "") for line in lines), (evaluation, "eval_")]:
        names = ("choice_reward", "choice_format_reward", "reasoning_length_reward")
        means = [line[f"{prefix}rewards/{name}/mean"] for name in names]
        assert line[f"{prefix}reward"] == pytest.approx(means[0] + 0.2 * means[1] + 0.2 * means[2], abs=1e-5)
        assert f"{prefix}rewards/choice_accuracy_of_answered/mean" in line
        assert f"{prefix}rewards/choice_accuracy/failed" not in line
    assert (data / "choices/best-checkpoint").resolve().name == "checkpoint-2"


def test_ddp_ranks_train_an_adapter_on_a_stream(train):
    """Plain posts as they come, without those that do not fit, and Dr. GRPO's loss. Under DDP the weights reach the
    server as they do under ZeRO-3.
    """
    source = test_data("tldr/tldr.jsonl")
    flags = ["--dataset_name", str(source), "--max_steps", "2", "--max_completion_length", "60"]
    flags += ["--vllm_max_model_length", "600", "--loss_type", "dr_grpo", "--scale_rewards", "none"]
    flags += ["--parallel", "ddp", "--use_peft", "true", "--lora_target_modules", "all-linear"]
    run = train("tldr_stream", *flags)
    assert "2 DDP ranks on the CPU; vLLM server" in run.text()
    assert not any("grpo_launcher.vllm_server" in line for _, line in run.command_lines)
    assert not list(run.run_folder().glob("checkpoint-*/global_step*"))
    assert "Left out a prompt of" in run.text()
    table = completions_of(run.run_folder())
    posts = {json.loads(line)["prompt"] for line in source.read_text().splitlines()}
    assert set(table["prompt"]) <= posts and set(table.groupby("prompt").size()) == {8}
    for _, group in table.groupby(["step", "prompt"]):
        expected = group["length_reward"] - group["length_reward"].mean()
        assert group["advantage"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-3), (
            "not scaled by the spread"
        )
    assert is_in_sync(run.metrics())
