"""Supervised recipes: what they may hold, what they plan, and that a run goes on from them."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tiny_models import make_adapter, make_encoder_model, make_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from grpo_launcher import merge
from grpo_launcher.preflight import gather
from grpo_launcher.guards import Guards
from grpo_launcher.config import RecipeParser, SupervisedConfig

ROWS = [
    {"prompt": f"The cat sat on the {place} of number {number}.", "reference": f"It sat on the {place}."} for number in range(8) for place in ("mat", "roof")
]
CHAT = [{"prompt": [{"role": "user", "content": row["prompt"]}], "reference": row["reference"]} for row in ROWS]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small model of each kind, and rows for it."""
    folder = tmp_path_factory.mktemp("supervised")
    make_encoder_model(folder / "t5", "t5")
    make_model(folder / "causal", seed=0)
    for name, rows in {"rows": ROWS, "chat": CHAT, "bare": [{"prompt": "a"}] * 16}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def facts(home, monkeypatch):
    """facts(*flags) → what the launcher would know of a supervised recipe for t5."""
    monkeypatch.chdir(home)
    return lambda *flags: gather(["--method", "sft", "--model_name_or_path", "t5", "--dataset_name", "rows.jsonl", *flags])


def test_its_defaults_are_those_of_supervised_training():
    """TRL's for SFT where the two methods differ; the recipe's own stay above them."""
    values, _ = RecipeParser().read(["--method", "sft"])
    theirs = SupervisedConfig(output_dir="unused", use_cpu=not torch.cuda.is_available(), bf16=False)
    assert (values.learning_rate, values.loss_type) == (theirs.learning_rate, theirs.loss_type) == (2e-5, "nll")
    assert RecipeParser().read(["--method", "sft", "--learning_rate", "1e-4"])[0].learning_rate == 1e-4
    assert RecipeParser().read([])[0].learning_rate == 1e-6


REFUSED = {
    "a field of rewards": (["--num_generations", "4"], "num_generations: a supervised run (method: sft) draws and rewards no replies"),
    "tools": (["--tools", "grpo_launcher.tools.calculator.calculator"], "tools: a supervised run"),
    "a server": (["--use_vllm", "true"], "use_vllm: a supervised run"),
    "a stream": (["--dataset_streaming", "true", "--max_steps", "2"], "dataset_streaming: a supervised run turns its rows into tokens"),
    "rows without gold": (["--dataset_name", "bare.jsonl"], "bare.jsonl has no column `reference` of texts"),
    "a best metric of rewards": (["--metric_for_best_model", "eval_reward"], "no such figure is logged; there are: eval_loss"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_for_rewards_alone_is_refused(case, facts):
    """Rather than passed over in silence."""
    flags, said = REFUSED[case]
    assert any(said in problem for problem in facts(*flags)["problems"]), facts(*flags)["problems"]


def test_every_device_trains(facts, make_plan):
    """Nothing is generated, so there is no server, and the batch is one of rows."""
    made = make_plan(facts("--gradient_accumulation_steps", "2"), 4)
    assert made.problems == [] and made.ranks == 4 and made.server is None
    assert "supervised, nothing is generated" in made.layout and "8 rows × 4 ranks × 2 accumulated = 64 rows a step" in "".join(made.lines)


@pytest.fixture(scope="module")
def taught(home, launch):
    """Two supervised runs as ZeRO-3 × 2: t5 with LoRA, evaluated, and a causal model; and GRPO from the adapter of the first, all by the one command."""
    flags = [
        "--method",
        "sft",
        "--max_steps",
        "12",
        "--gradient_checkpointing",
        "false",
        "--learning_rate",
        "5e-3",
        "--reward_funcs",
        "rewards.rouge.rouge_reward",
    ]
    recipe = home / "mine.yaml"
    recipe.write_text("dataset_name: rows.jsonl\nmax_completion_length: 12\n")
    found = {}
    evaluated = ["--eval_strategy", "steps", "--eval_steps", "6", "--dataset_test_split", "train", "--use_peft", "true", "--lora_target_modules", "all-linear"]
    grpo = ["--model_name_or_path", "runs/lora/final-checkpoint", "--max_steps", "1", "--reward_funcs", "rewards.rouge.rouge_reward"]
    grpo += ["--beta", "0.04", "--parallel", "ddp"]
    for name, asked in {
        "lora": ["--model_name_or_path", "t5", *flags, *evaluated],
        "causal": ["--model_name_or_path", "causal", "--dataset_name", "chat.jsonl", *flags],
        "grpo": grpo,
    }.items():
        found[name] = launch(home, str(recipe), "--output_dir", f"runs/{name}", *asked)
        assert found[name].finish(200) == 0, found[name].text()[-4000:]
    return found


@pytest.mark.slow
def test_both_kinds_learn_their_references(taught, home):
    """The same folder as any run, with a loss that falls; what is said afterwards is the gold."""
    for name in ("lora", "causal"):
        lines = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == 12 and losses[-1] < 0.8 * losses[0], losses
        text, card = taught[name].text(), (home / "runs" / name / "final-checkpoint/README.md").read_text()
        assert "2 ZeRO-3 ranks on the CPU; supervised, nothing is generated" in text and re.search(r"step 12/12  loss \d", text)
        assert "taught the references of" in card and "- sft" in card and "## Rewards" not in card and (home / "runs" / name / "curves.png").exists()
        assert taught[name].leftovers() == []
    assert taught["lora"].text().count("held out at step") == 2
    assert "AutoModelForSeq2SeqLM" in (home / "runs/lora/final-checkpoint/README.md").read_text()
    assert json.loads((home / "runs/lora/final-checkpoint/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.slow
def test_grpo_goes_on_from_the_adapter(taught, home):
    """Two commands: the second merges what the first saved, and starts from that."""
    assert "Merging the adapter runs/lora/final-checkpoint into its base" in taught["grpo"].text()
    merged = AutoModelForSeq2SeqLM.from_pretrained(home / "runs/lora/final-checkpoint/merged")
    base = AutoModelForSeq2SeqLM.from_pretrained(home / "t5")
    assert not torch.equal(merged.encoder.block[0].layer[0].SelfAttention.q.weight, base.encoder.block[0].layer[0].SelfAttention.q.weight)
    line = json.loads((home / "runs/grpo/metrics.jsonl").read_text().splitlines()[0])
    assert abs(line["kl"]) < 1e-9 and "model_name_or_path: runs/lora/final-checkpoint/merged" in (home / "runs/grpo/recipe.yaml").read_text()


@pytest.mark.slow
def test_a_supervised_run_resumes(taught, launch, home):
    """From its checkpoint, to more steps."""
    shutil.rmtree(home / "runs/causal/final-checkpoint")
    run = launch(home, str(home / "mine.yaml"), "--output_dir", "runs/causal", "--resume", "--max_steps", "13")
    assert run.finish(200) == 0, run.text()[-4000:]
    steps = [json.loads(line)["step"] for line in (home / "runs/causal/metrics.jsonl").read_text().splitlines()]
    assert "from checkpoint-12" in run.text() and steps == list(range(1, 14))
