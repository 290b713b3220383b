"""Every recipe in configs/: read as a run would, planned for the hardware that it names, and trained for two steps."""

import json
import re
import subprocess
import sys
from statistics import mean

import pandas
import pytest
import yaml
from conftest import ROOT, test_data

import process_dataset
from grpo_launcher.plugins import load_rewards
from grpo_launcher.preflight import gather
from grpo_launcher.config import Recipe, RecipeParser

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
by_name = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


@by_name
def test_it_parses_and_its_rewards_resolve(config):
    """The real parser reads it, and every name in it is something."""
    values, given = RecipeParser().read(["--config", str(config)])
    supervised = values.method == "sft"
    rewards = load_rewards(Recipe(reward_funcs=values.reward_funcs, reward_kwargs=values.reward_kwargs), weights=values.reward_weights)
    assert rewards and {"model_name_or_path", "dataset_name"} <= set(given)
    assert supervised or ("beta" in given and values.beta > 0)
    assert len(config.read_text().splitlines()) <= 40


@by_name
def test_only_what_differs_from_a_default_stands_in_it(config):
    """Else a default that changes with a version would be pinned here unseen."""
    method = yaml.safe_load(config.read_text()).get("method", "grpo")
    defaults, _ = RecipeParser().read(["--method", method], adapt=False)
    values, given = RecipeParser().read(["--config", str(config)], adapt=False)
    assert [name for name in given if getattr(values, name) == getattr(defaults, name) and name != "method"] == []


KIN = {path: said for path in CONFIGS if (said := re.search(r"^# Differs from (\S+) in: (.*)\.$", path.read_text(), re.M))}


@pytest.mark.parametrize("config", KIN, ids=lambda path: path.stem)
def test_it_differs_from_its_kin_in_what_it_says(config):
    """`# Differs from NAME.yaml in: fields.` is true to the field."""
    ours, theirs = (yaml.safe_load(path.read_text()) for path in (config, config.with_name(KIN[config][1])))
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} == set(KIN[config][2].split(", "))


PLANS = {  # GPUs and GiB of each for which a recipe says that it is made → ranks that train, and who generates
    "kuakua": {(1, 24): (1, "colocate"), (2, 24): (1, "server"), (4, 24): (3, "server")},
    "mcq_refusal": {(2, 24): (1, "server"), (4, 24): (3, "server")},
    "tldr_ddp": {(3, 24): (2, "server"), (4, 24): (3, "server")},
    "tldr_dr_grpo": {(2, 48): (1, "server"), (4, 24): (3, "server")},
    "tldr_length": {(2, 48): (1, "server"), (4, 24): (3, "server")},
    "tldr_lora": {(1, 24): (1, "colocate"), (2, 24): (1, "server")},
    "tldr_qlora": {(1, 24): (1, None), (2, 24): (2, None), (4, 24): (4, None)},
    "summarize_bart": {(1, 24): (1, None), (4, 24): (4, None)},
    "summarize_t5": {(1, 24): (1, None), (2, 24): (2, None)},
    "summarize_t5_lora": {(1, 16): (1, None), (4, 16): (4, None)},
    "summarize_t5_sft": {(1, 16): (1, None), (2, 16): (2, None)},
    "tldr_rouge": {(2, 48): (1, "server"), (4, 24): (3, "server")},
    "tldr_ref_sync": {(2, 48): (1, "server"), (4, 24): (3, "server")},
    "tldr_stream": {(2, 48): (1, "server"), (4, 24): (3, "server")},
}


WITH_ENCODER = [path.stem for path in CONFIGS if "summar" in path.stem]


@pytest.fixture(scope="session")
def of_size(resolved):
    """resolved, with what a config.json would say of the models with an encoder."""

    def resolve(name: str) -> dict:
        facts = resolved(name)
        if name in WITH_ENCODER:
            millions = 406 if name.endswith("bart") else 223  # as facebook/bart-large-cnn and google-t5/t5-base
            facts["model"] = {"parameters": millions * 10**6, "heads": None, "context": None, "encoder_decoder": True, "source": "its config.json"}
        return facts

    return resolve


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_it_is_planned_for_the_hardware_that_it_names(name, of_size, make_plan):
    """Without a GPU two ranks, with one, two and four a plan or a refusal for want of memory alone."""
    cpu = make_plan(of_size(name), 0)
    parallel, server = ("ddp", None) if name == "tldr_qlora" else ("ddp" if name == "tldr_ddp" else "zero3", "server")
    server = server and name not in WITH_ENCODER
    assert cpu.ranks == 2 and cpu.values["parallel"] == parallel and bool(cpu.server) == bool(server)
    assert cpu.accelerate["distributed_type"] == {"ddp": "MULTI_GPU", "zero3": "DEEPSPEED"}[parallel]
    for (gpus, memory), (ranks, generates) in PLANS.get(name, {}).items():
        made = make_plan(of_size(name), gpus, memory)
        assert made.problems == [] and made.ranks == ranks, (gpus, memory, made.problems)
        assert (made.values["vllm_mode"] if made.values["use_vllm"] else None) == generates
        assert made.accelerate["num_processes"] == ranks
    for gpus in (0, 1, 2, 4):
        assert all(problem.startswith("memory: ") for problem in make_plan(of_size(name), gpus).problems), gpus


@pytest.fixture(scope="module")
def data(workplace):
    """A folder with the base model, real posts and real questions, prepared by the command."""
    folder = workplace()
    options = ["--tokenizer", "data/quickstart-model", "--limit", "100"]
    for name, source in {"tldr": "tldr/tldr.jsonl", "mcq": "mcq/tmmlu.csv"}.items():
        command = [sys.executable, str(ROOT / "process_dataset.py"), name, "--source", str(test_data(source)), "--output", name, *options]
        subprocess.run([*command, "--max_prompt_length", "700"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def trained(data, launch):
    """trained(name, *flags) → the recipe's finished run with the base model swapped in, and figures that make two steps short."""

    def train(name: str, *flags: str):
        fixed = [
            "--model_name_or_path",
            "data/quickstart-model",
            "--gradient_accumulation_steps",
            "1",
            "--gradient_checkpointing",
            "false",
            "--warmup_steps",
            "0",
        ]
        run = launch(data, str(ROOT / f"configs/{name}.yaml"), *fixed, "--warmup_steps", "0", *flags)
        assert run.finish(400) == 0, run.text()[-4000:]
        assert (run.run_folder() / "final-checkpoint/README.md").exists() and run.leftovers() == []
        return run

    return train


def in_step(run) -> bool:
    """Whether server and trainer held the same weights."""
    return max(line["sampling/sampling_logp_difference/max"] for line in run.metrics() if "reward" in line) < 1e-3


@pytest.mark.slow
def test_dr_grpo_neither_scales_nor_forgives(trained):
    """Two steps under ZeRO-3: an advantage is the reward less its group's mean, and nothing else."""
    run = trained("tldr_dr_grpo", "--dataset_name", "tldr", "--max_steps", "2", "--eval_strategy", "no", "--max_completion_length", "100")
    table = pandas.concat(map(pandas.read_parquet, (run.run_folder() / "completions").glob("*.parquet")))
    for _, group in table.groupby(["step", table["prompt"].map(str)]):
        expected = group["length_reward"] - group["length_reward"].mean()
        assert group["advantage"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-3)
    assert table["advantage"].abs().max() > 2, "scaled by the spread it would hardly be"
    assert in_step(run)


@pytest.mark.slow
def test_ddp_ranks_train_beside_a_server(trained):
    """Two steps of LoRA under DDP, weights handed to the server as under ZeRO-3."""
    run = trained("tldr_ddp", "--dataset_name", "tldr", "--max_steps", "2", "--max_completion_length", "100", "--learning_rate", "1e-3")
    assert "2 DDP ranks on the CPU; vLLM server" in run.text() and "dtype: bfloat16 → float32" in run.text()
    assert {rank for rank, line in run.seen if "train.py --config" in line and "accelerate" not in line} == {"0", "1"}
    assert in_step(run) and not list(run.run_folder().glob("checkpoint-*/global_step*"))


@pytest.mark.slow
def test_four_bit_weights_are_trained_on(trained, data):
    """Two steps of QLoRA under DDP, on bitsandbytes' CPU kernels; the layers are counted while it runs."""
    (data / "mine.py").write_text(
        "import gc\n\nimport bitsandbytes\n\n\n"
        "def length(completions, *, log_metric, **columns):\n"
        "    layers = [one for one in gc.get_objects() if isinstance(one, bitsandbytes.nn.Linear4bit)]\n"
        "    log_metric('four_bit_layers', len(layers))\n"
        "    log_metric('bytes_a_layer', sum(one.weight.element_size() for one in layers) / max(1, len(layers)))\n"
        "    return [float(len(one[-1]['content'])) for one in completions]\n"
    )
    flags = ["--dataset_name", "tldr", "--max_steps", "2", "--max_completion_length", "48", "--reward_funcs", "mine.length", "--reward_kwargs", "{}"]
    run = trained("tldr_qlora", *flags)
    assert "2 DDP ranks on the CPU; generation by transformers" in run.text()
    for line in run.metrics():
        assert line["four_bit_layers"] == 28 and line["bytes_a_layer"] == 1 and line["grad_norm"] > 0, "seven in each of four layers"
    assert (run.run_folder() / "final-checkpoint/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_reference_follows_and_the_best_checkpoint_is_kept(trained):
    """Under ZeRO-3: after a sync with the whole of the policy no KL is left; and the best of three evaluations stays, marked, where two may."""
    run = trained(
        "tldr_ref_sync", "--dataset_name", "tldr", "--max_steps", "6", "--max_completion_length", "160", "--per_device_train_batch_size", "16",
        "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--ref_model_sync_steps", "3", "--ref_model_mixup_alpha", "1",
        "--eval_steps", "2", "--eval_rows", "10", "--save_steps", "2", "--save_total_limit", "2", "--metric_for_best_model", "eval_rewards/rouge_reward/mean",
    )  # fmt: skip
    folder, lines = run.run_folder(), run.metrics()
    kl = {line["step"]: line["kl"] for line in lines if "kl" in line}
    assert kl[2] > 1e-3 and kl[3] > 1e-3 and kl[4] < 1e-6 < kl[5], "the reference stood, then moved onto the policy of step 3"
    assert [line["eval_kl"] < 1e-6 for line in lines if "eval_kl" in line] == [False, False, True], "the third comes right after the second sync"
    figures = {line["step"]: line["eval_rewards/rouge_reward/mean"] for line in lines if "eval_reward" in line}
    assert [*figures] == [2, 4, 6]
    best = max(figures, key=figures.get)
    assert (folder / "best-checkpoint").resolve() == folder / f"checkpoint-{best}" and (folder / "best-checkpoint/model.safetensors").exists()
    there = {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}
    assert len(there) == 2 and {best, 6} <= there, "the best and the last, of three"
    assert "evaluation: 10 prompts × 2 replies, 8 prompts at once = 2 rounds; the last is filled up with 6" in run.text()
    assert run.text().count("held out at step") == 3 and "rouge_reward +0." in run.text()
    kept = pandas.concat(map(pandas.read_parquet, (folder / "completions").glob("*.parquet")))
    assert kept.groupby("step").size().to_dict() == dict.fromkeys(range(1, 7), 32), "the held-out replies did not take the place of these"
    assert in_step(run)


@pytest.mark.slow
def test_a_stream_is_trained_on(trained):
    """Two steps on plain posts as they come from a file, without those that would not fit; nothing is prepared."""
    source = test_data("tldr/tldr.jsonl")
    flags = ["--dataset_name", str(source), "--max_steps", "2", "--max_completion_length", "60", "--vllm_max_model_length", "600"]
    run = trained("tldr_stream", *flags)
    assert "context: prompts up to 540 + reply 60 = 600 tokens" in run.text() and "Left out of the stream: a prompt of" in run.text()
    table = pandas.concat(map(pandas.read_parquet, (run.run_folder() / "completions").glob("*.parquet")))
    posts = {json.loads(line)["prompt"] for line in source.read_text().splitlines()}
    assert set(table["prompt"]) <= posts and set(table.groupby("prompt").size()) == {8}
    assert in_step(run)


@pytest.mark.slow
def test_multiple_choice_is_trained_and_evaluated(trained):
    """Two steps on real questions and an evaluation: every measure under its name, none of them taught."""
    run = trained(
        "mcq_refusal", "--dataset_name", "mcq", "--max_steps", "2", "--max_completion_length", "64", "--eval_steps", "2",
        "--eval_rows", "8", "--save_steps", "2", "--learning_rate", "1e-3", "--guards", '{"frac_reward_zero_std": null}',
    )  # fmt: skip
    *lines, held_out = run.metrics()
    for line, prefix in [(line, "") for line in lines] + [(held_out, "eval_")]:
        weighted = [line[f"{prefix}rewards/{name}/mean"] for name in ("choice_reward", "choice_format_reward", "reasoning_length_reward")]
        assert line[f"{prefix}reward"] == pytest.approx(weighted[0] + 0.2 * weighted[1] + 0.2 * weighted[2], abs=1e-5)
        assert line[f"{prefix}rewards/choice_accuracy/mean"] <= 1 and line[f"{prefix}rewards/choice_refusal/mean"] <= 1
        assert f"{prefix}rewards/choice_accuracy_of_answered/mean" in line and f"{prefix}rewards/choice_accuracy/failed" not in line
    assert (run.run_folder() / "best-checkpoint").resolve().name == "checkpoint-2"
    assert in_step(run) and mean(line["kl"] for line in lines) >= 0


COMBINATIONS = {
    "vLLM with 4-bit weights": ("tldr_qlora", ["--use_vllm", "true"], "use_vllm: load_in_4bit: TRL cannot hand quantised weights to vLLM (trl#4973, trl#3466)"),
    "ZeRO-3 with 4-bit weights": ("tldr_qlora", ["--parallel", "zero3"], "parallel: zero3: load_in_4bit: ZeRO-3 cannot shard"),
    "4-bit weights without LoRA": ("tldr_qlora", ["--use_peft", "false"], "use_peft: load_in_4bit: quantised weights cannot be trained"),
    "a synced reference without KL": ("tldr_ref_sync", ["--beta", "0"], "sync_ref_model: with beta 0 there is no reference"),
    "a synced reference with LoRA": ("tldr_ref_sync", ["--use_peft", "true"], "sync_ref_model: with LoRA the reference is the base model"),
    "a stream without an end": ("tldr_stream", ["--max_steps", "-1"], "max_steps: a streamed dataset has no length"),
    "a best metric that nobody logs": (
        "mcq_refusal",
        ["--metric_for_best_model", "eval_accuracy"],
        "no such figure is logged; there are: eval_reward, ",
    ),
    "a best metric without evaluation": ("mcq_refusal", ["--eval_strategy", "no"], "nothing is evaluated; eval_strategy: steps"),
    "a best step that is not saved": ("mcq_refusal", ["--eval_steps", "20"], "save_steps 20, as eval_steps"),
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_what_trl_cannot_do_together_is_refused_with_what_it_can(case):
    """Before a model loads, by launcher and train.py alike."""
    name, flags, said = COMBINATIONS[case]
    problems = gather(["--config", str(ROOT / f"configs/{name}.yaml"), *flags])["problems"]
    assert len(problems) == 1 and said in problems[0], problems
    if name == "tldr_qlora":
        assert "configs/tldr_qlora.yaml works" in problems[0]


def test_no_python_file_knows_a_recipe_by_name_but_in_what_it_tells():
    """A new recipe costs a YAML: train.py and the rooms do not ask for one by name."""
    for path in [ROOT / "train.py", ROOT / "process_dataset.py", *(ROOT / "training").glob("*.py"), *(ROOT / "rewards").glob("*.py")]:
        told = re.sub(r'f?"[^"\n]*configs/\w+\.yaml[^"\n]*"|"""[\s\S]*?"""', "", path.read_text())
        recipes = [config.stem for config in CONFIGS if config.stem not in (*process_dataset.NAMES, "quickstart")]  # some share a dataset's name
        assert not re.search("|".join(rf"\b{name}\b" for name in recipes), told), path
